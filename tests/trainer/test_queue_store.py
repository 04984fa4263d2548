"""The trainer's queue and list of versions, over a real SQLite file and a real PostgreSQL alike."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from metaclaw_hooks.types import AdapterVersion, Sample, SampleTurn
from metaclaw_hooks.wire import AgentTraining
from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.errors import ConflictError, StoreError, UnknownAgentError, UnknownVersionError
from metaclaw_trainer.owners import Owner
from metaclaw_trainer.ports import Head
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.schema import owners
from metaclaw_trainer.store import Store, open_store
from metaclaw_trainer.versions import StoredVersions

from tests.postgres_server import create_database, running_postgres

LIMITS = Limits(vocabulary=1000, max_tokens=64, max_queued=6, batch_size=3)


def sample(name: str, agent: str = "alpha", version: int = 0, traces: tuple[str, ...] = ()) -> Sample:
    names = traces or (f"trace-{name}",)
    turns = tuple(SampleTurn(t, 2 + 3 * i, (-0.1 * (i + 1), -0.25), 0.5 - i) for i, t in enumerate(names))
    return Sample(name, agent, f"session-{name}", tuple(range(1, 4 + 3 * len(names))), turns, version, 2, "a hint")


def version(number: int, parent: int = 0, agent: str = "alpha") -> AdapterVersion:
    return AdapterVersion(
        agent, number, "base", parent, ("t",), number, {"loss": 0.5}, "0" * 64, {"torch": "2"}, f"/none/{number}", 1.0
    )


class Rooms:
    """One trainer process's view of a store."""

    def __init__(self, store: Store, folder: Path, limits: Limits = LIMITS) -> None:
        self.store = store
        self.owner = Owner(store, folder / "owners", lease_seconds=900)
        self.queue = StoredQueue(store, self.owner.id, limits)
        self.agents = AgentBook(store, limits.batch_size)
        self.versions = StoredVersions(store, self.owner.id)


_databases = itertools.count()


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with running_postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'queue.db'}"
    return create_database(request.getfixturevalue("postgres"), f"queue{next(_databases)}")


@pytest.fixture
def rooms(url: str, tmp_path: Path) -> Iterator[Rooms]:
    store = open_store(url)
    yield Rooms(store, tmp_path)
    store.close()


def allow(rooms: Rooms, agent: str = "alpha") -> None:
    rooms.agents.set_training(agent, AgentTraining(allowed=True))


def test_a_sample_comes_back_exactly_as_it_was_given(rooms: Rooms) -> None:
    given = sample("a", traces=("t1", "t2"))
    rooms.queue.put([given])
    assert rooms.queue.claim("alpha", 5) == [given]


def test_sending_a_sample_twice_queues_it_once(rooms: Rooms) -> None:
    first = rooms.queue.put([sample("a"), sample("b"), sample("a")])
    assert (first.accepted, first.duplicate) == (["a", "b"], ["a"])
    again = rooms.queue.put([sample("b"), sample("c")])
    assert (again.accepted, again.duplicate) == (["c"], ["b"])
    assert [s.id for s in rooms.queue.claim("alpha", 9)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (Sample("x", "alpha", "s", (1, 1000), (SampleTurn("t", 1, (-1.0,), 0.0),), 0, 0), "outside the vocabulary"),
        (Sample("x", "alpha", "s", (1,) * 65, (SampleTurn("t", 1, (-1.0,), 0.0),), 0, 0), "max_sample_tokens"),
        (sample("x", version=3), "this trainer made 0"),
        (sample("x", version=2**70), "this trainer made 0"),
        (replace(sample("x"), skill_generation=2**70), "no database keeps"),
        (replace(sample("x"), session="a\x00b"), "no database keeps"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_reason(rooms: Rooms, given: Sample, words: str) -> None:
    result = rooms.queue.put([given, sample("good")])
    assert result.accepted == ["good"]
    assert result.refused[0][0] == "x"
    assert words in result.refused[0][1]


def test_a_full_queue_takes_what_fits_and_says_which_agent_is_full(rooms: Rooms) -> None:
    result = rooms.queue.put([*(sample(f"s{i}") for i in range(8)), sample("other", agent="beta")])
    assert len(result.accepted) == 7
    assert result.full == [("s6", "alpha"), ("s7", "alpha")]


def test_only_allowed_agents_with_a_full_batch_are_ready_longest_waiting_first(rooms: Rooms) -> None:
    rooms.queue.put([sample(f"b{i}", agent="beta") for i in range(3)] + [sample(f"a{i}") for i in range(4)])
    assert rooms.queue.ready() == []
    allow(rooms)
    assert rooms.queue.ready() == [("alpha", 3)]
    allow(rooms, "beta")
    assert rooms.queue.ready() == [("beta", 3), ("alpha", 3)]
    rooms.agents.set_training("beta", AgentTraining(batch_size=4))
    assert rooms.queue.ready() == [("alpha", 3)]


def test_a_version_and_the_end_of_its_samples_are_one_transaction(rooms: Rooms) -> None:
    rooms.queue.put([sample(f"s{i}") for i in range(3)])
    allow(rooms)
    ids = [s.id for s in rooms.queue.claim("alpha", 3)]
    assert rooms.versions.commit(version(1), ids, generation=0)
    assert rooms.versions.commit(version(1), ids, generation=0), "saying it again changes nothing"
    assert [(v.number, v.cursor) for v in rooms.versions.after(0)] == [(1, 1)]
    status = rooms.agents.status("alpha")
    assert (status.trained, status.queued, status.head, status.newest, status.step) == (3, 0, 1, 1, 1)
    assert not status.training


def test_a_step_that_began_before_the_head_was_put_back_is_not_committed(rooms: Rooms) -> None:
    rooms.queue.put([sample(f"s{i}") for i in range(6)])
    first = [s.id for s in rooms.queue.claim("alpha", 3)]
    rooms.versions.commit(version(1), first, 0)
    second = [s.id for s in rooms.queue.claim("alpha", 3)]
    began = rooms.versions.head("alpha").generation
    assert rooms.versions.put_head("alpha", 0) == Head(0, 1, began + 1)
    assert not rooms.versions.commit(version(2, 1), second, began)
    assert rooms.agents.status("alpha").trained == 3
    rooms.queue.release(second)
    assert rooms.agents.status("alpha").queued == 3


def test_the_head_goes_only_to_versions_that_are_there(rooms: Rooms) -> None:
    for number in (4, 2**70):
        with pytest.raises(UnknownVersionError, match=f"no version {number}"):
            rooms.versions.put_head("alpha", number)


def test_a_failed_step_is_shown_and_tried_again_later(rooms: Rooms) -> None:
    rooms.queue.put([sample(f"s{i}") for i in range(3)])
    allow(rooms)
    rooms.queue.release([s.id for s in rooms.queue.claim("alpha", 3)], "out of memory")
    assert rooms.queue.ready() == []
    assert "the last step failed: out of memory; next try in" in (rooms.agents.status("alpha").idle_reason or "")
    assert rooms.agents.train_now("alpha") is None
    assert rooms.queue.ready() == [("alpha", 3)]


def test_a_batch_that_could_not_be_given_back_is_taken_up_again_by_its_own_process(
    rooms: Rooms, tmp_path: Path
) -> None:
    rooms.queue.put([sample(f"s{i}") for i in range(3)])
    allow(rooms)
    claimed = rooms.queue.claim("alpha", 3)  # and then neither committed nor released
    assert Rooms(rooms.store, tmp_path).queue.ready() == []
    assert rooms.queue.ready() == [("alpha", 3)]
    assert rooms.queue.claim("alpha", 3) == claimed
    assert rooms.versions.commit(version(1), [s.id for s in claimed], 0)
    assert rooms.queue.ready() == []


def test_status_says_in_one_line_why_nothing_is_training(rooms: Rooms) -> None:
    rooms.queue.put([sample("s0"), sample("s1")])
    assert rooms.agents.status("alpha").idle_reason == "2 of 3 samples are waiting"
    rooms.queue.put([sample("s2")])
    assert "the worker does not allow training now" in (rooms.agents.status("alpha").idle_reason or "")
    allow(rooms)
    assert rooms.agents.status("alpha").idle_reason is None
    ids = [s.id for s in rooms.queue.claim("alpha", 3)]
    assert rooms.agents.status("alpha").training
    rooms.queue.set_aside(ids[:2], "9 versions behind the head")
    rooms.versions.skipped("alpha", ids[2:], "all rewards are the same")
    reason = rooms.agents.status("alpha").idle_reason or ""
    assert reason.startswith("0 of 3 samples are waiting; 3 set aside, the last because: ")
    with pytest.raises(UnknownAgentError):
        rooms.agents.status("nobody")


def test_train_now_takes_what_is_there_allowed_or_not(rooms: Rooms) -> None:
    rooms.queue.put([sample("s0")])
    assert rooms.agents.train_now("alpha") is None
    assert rooms.queue.ready() == [("alpha", 1)]
    claimed = rooms.queue.claim("alpha", 1)
    assert rooms.agents.train_now("alpha") == "a step of alpha is running"
    rooms.queue.set_aside([claimed[0].id], "x")
    assert rooms.agents.train_now("alpha") == "no sample of alpha is waiting"


def test_recalled_traces_leave_the_queue_and_name_what_learned_from_them(rooms: Rooms) -> None:
    rooms.queue.put([sample(f"s{i}") for i in range(5)])
    rooms.versions.commit(version(1), [s.id for s in rooms.queue.claim("alpha", 2)], 0)
    rooms.versions.commit(version(2, 1), [s.id for s in rooms.queue.claim("alpha", 1)], 0)
    removed, trained = rooms.queue.recall(["trace-s0", "trace-s4", "trace-unknown", "x" * 999, "a\x00b"])
    assert removed == ["s4"]
    assert trained == ["alpha@v1", "alpha@v2"], "version 2 was trained from version 1"
    assert [s.id for s in rooms.queue.claim("alpha", 9)] == ["s3"]
    late = rooms.queue.put([sample("late", traces=("trace-new", "trace-s4"))])
    assert "was deleted by its owner" in late.refused[0][1]


def test_a_recall_in_the_middle_of_a_step_keeps_the_trace_out_of_the_weights(rooms: Rooms) -> None:
    rooms.queue.put([sample(f"s{i}") for i in range(3)])
    ids = [s.id for s in rooms.queue.claim("alpha", 3)]
    assert rooms.queue.recall(["trace-s1"]) == (["s1"], [])
    assert not rooms.versions.commit(version(1), ids, generation=0)
    rooms.queue.release(ids)
    assert [s.id for s in rooms.queue.claim("alpha", 3)] == ["s0", "s2"]


def test_a_reward_that_changed_counts_for_what_is_not_trained_yet(rooms: Rooms) -> None:
    rooms.queue.put([sample("s0", traces=("a", "b")), sample("s1"), sample("s2")])
    trained = [s.id for s in rooms.queue.claim("alpha", 1)]
    assert rooms.queue.set_rewards({"a": 0.25}) == ([], ["a"]), "it is in a step that is running"
    rooms.queue.release(trained, "the step failed")
    assert rooms.queue.set_rewards({"b": -1.0, "trace-s2": 1.0, "unknown": 1.0, "a\x00b": 1.0}) == (
        ["b", "trace-s2"],
        [],
    )
    claimed = rooms.queue.claim("alpha", 3)
    assert [[turn.reward for turn in s.turns] for s in claimed] == [[0.5, -1.0], [0.5], [1.0]]
    assert claimed[0].turns[1].logprobs == (-0.2, -0.25)
    rooms.versions.commit(version(1), [s.id for s in claimed], 0)
    assert rooms.queue.set_rewards({"b": 1.0}) == ([], [])


def test_recalled_tokens_are_gone_from_the_file(rooms: Rooms, tmp_path: Path) -> None:
    rooms.queue.put([sample("s0")])
    rooms.queue.recall(["trace-s0"])
    with rooms.store.read() as c:
        row = c.exec_driver_sql("SELECT token_ids, logprobs, hint FROM samples").one()
    assert tuple(row) == (None, None, None)


def test_two_processes_never_train_one_agent_at_once(rooms: Rooms, tmp_path: Path) -> None:
    other = Rooms(rooms.store, tmp_path)
    rooms.queue.put([sample(f"s{i}") for i in range(6)])
    allow(rooms)
    ids = [s.id for s in rooms.queue.claim("alpha", 3)]
    assert other.queue.ready() == []
    assert other.queue.claim("alpha", 3) == []
    assert not other.versions.commit(version(1), ids, 0), "not its samples"
    rooms.versions.commit(version(1), ids, 0)
    assert len(other.queue.claim("alpha", 3)) == 3


def _claim_and_hang(url: str, folder: str, claimed: multiprocessing.Queue[list[str]]) -> None:
    rooms = Rooms(open_store(url), Path(folder))
    claimed.put([s.id for s in rooms.queue.claim("alpha", 3)])
    signal.pause()


@pytest.mark.law(3)
def test_what_a_killed_trainer_had_claimed_is_trained_once_by_the_next(rooms: Rooms, url: str, tmp_path: Path) -> None:
    rooms.queue.put([sample(f"s{i}") for i in range(3)])
    context = multiprocessing.get_context("spawn")
    claimed: multiprocessing.Queue[list[str]] = context.Queue()
    process = context.Process(target=_claim_and_hang, args=(url, str(tmp_path), claimed))
    process.start()
    ids = claimed.get(timeout=60)
    assert rooms.owner.reap() == [], "it lives"
    assert rooms.queue.claim("alpha", 3) == []
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    rooms.owner.heartbeat()
    assert [s.id for s in rooms.queue.claim("alpha", 3)] == ids == ["s0", "s1", "s2"]
    assert rooms.versions.commit(version(1), ids, 0)


def test_a_process_of_another_machine_is_dead_when_its_heartbeat_is_old(rooms: Rooms, tmp_path: Path) -> None:
    other = Rooms(rooms.store, tmp_path / "elsewhere")
    rooms.queue.put([sample("s0")])
    other.queue.claim("alpha", 1)
    assert rooms.owner.reap() == []
    with rooms.store.write() as c:
        old = {"seen_at": owners.c.seen_at - 1000, "host": "far"}
        c.execute(owners.update().where(owners.c.id == other.owner.id).values(**old))
    assert rooms.owner.reap() == [other.owner.id]
    assert [s.id for s in rooms.queue.claim("alpha", 1)] == ["s0"]


def test_the_served_set_is_kept_whole_and_leaves_out_what_was_never_made(rooms: Rooms) -> None:
    rooms.queue.put([sample("s0"), sample("s1")])
    rooms.versions.commit(version(1), [rooms.queue.claim("alpha", 1)[0].id], 0)
    rooms.versions.commit(version(2, 1), [rooms.queue.claim("alpha", 1)[0].id], 0)
    unknown = rooms.versions.set_served(["alpha@v2", "alpha@v9", "../x", "alpha@v2"])
    assert set(unknown) == {"alpha@v9", "../x"}
    assert [(w.name, w.path) for w in rooms.versions.served()] == [("alpha@v2", "/none/2")]
    rooms.versions.set_served(["alpha@v1"])
    assert [w.name for w in rooms.versions.served()] == ["alpha@v1"]


def test_a_head_whose_files_were_removed_is_refused(rooms: Rooms) -> None:
    rooms.queue.put([sample("s0")])
    rooms.versions.commit(version(1), [rooms.queue.claim("alpha", 1)[0].id], 0)
    with rooms.store.write() as c:
        c.exec_driver_sql("UPDATE versions SET removed_at = 1")
    with pytest.raises(ConflictError, match="removed to save space"):
        rooms.versions.put_head("alpha", 1)
    assert rooms.versions.set_served(["alpha@v1"]) == {"alpha@v1": "its files were removed to save space"}


@pytest.mark.parametrize("url", ["no url", "sqlite:////proc/none/queue.db", "nosuchdb://x/y"])
def test_a_store_that_cannot_be_opened_is_one_line(url: str) -> None:
    with pytest.raises(StoreError) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)


def test_many_processes_and_threads_spend_every_sample_once(rooms: Rooms, tmp_path: Path) -> None:
    names = [f"agent-{i}" for i in range(4)]
    others = [Rooms(rooms.store, tmp_path) for _ in range(4)]
    for name in names:
        rooms.queue.put([sample(f"{name}-{i}", agent=name) for i in range(6)])
        allow(rooms, name)
    trained: list[str] = []

    def work(mine: Rooms) -> None:
        while ready := mine.queue.ready():
            for name, size in ready:
                ids = [s.id for s in mine.queue.claim(name, size)]
                head = mine.versions.head(name)
                if ids and mine.versions.commit(version(head.newest + 1, head.head, name), ids, head.generation):
                    trained.extend(ids)

    with ThreadPoolExecutor(len(others)) as pool:
        list(pool.map(work, others))
    assert sorted(trained) == sorted(f"{name}-{i}" for name in names for i in range(6))
    listed = rooms.versions.after(0)
    assert [v.cursor for v in listed] == list(range(1, 9))
    assert sorted((v.agent, v.number) for v in listed) == sorted((name, n) for name in names for n in (1, 2))


def test_a_sample_sent_by_many_at_once_is_queued_once(rooms: Rooms) -> None:
    def send(_: int) -> tuple[int, int]:
        for _attempt in range(20):
            try:
                result = rooms.queue.put([sample("same")])
            except StoreError:  # the other one is just writing it: sent again, as the worker does
                continue
            return len(result.accepted), len(result.duplicate)
        raise AssertionError("never answered")

    with ThreadPoolExecutor(6) as pool:
        counts = list(pool.map(send, range(6)))
    assert len(rooms.queue.claim("alpha", 9)) == 1
    assert sum(accepted for accepted, _ in counts) == 1
