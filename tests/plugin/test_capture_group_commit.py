"""One writing thread, many jobs to a transaction, and other gateway processes that do the same on the same rows."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from metaclaw_plugin.capture.group_commit import GroupCommit
from metaclaw_plugin.capture.quota import Quota
from metaclaw_plugin.capture.writer import TraceWriter
from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.codec import encode_trace
from metaclaw_plugin.store.counters import count, read_counters
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import STORED_BYTES
from tests.store_cases import a_trace


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = open_store(f"sqlite:///{tmp_path / 'store.db'}")
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Iterator[GroupCommit]:
    store = GroupCommit(engine)
    yield store
    assert store.close(10)


def test_jobs_that_wait_together_share_a_transaction(store: GroupCommit) -> None:
    gate = threading.Event()
    first = store.submit(lambda _: gate.wait(5))
    commits: list[int] = []
    later = [store.submit(lambda c: commits.append(id(c.get_transaction()))) for _ in range(20)]
    gate.set()
    assert first.result(5)
    for future in later:
        future.result(5)
    assert len(set(commits)) == 1


def test_a_job_that_fails_takes_no_other_with_it(store: GroupCommit, engine: Engine) -> None:
    gate = threading.Event()
    store.submit(lambda _: gate.wait(5))

    def half(c: sa.Connection) -> None:
        add_agent(c, "half")
        raise ValueError("after the write")

    before = store.submit(lambda c: add_agent(c, "before"))
    failed = store.submit(half)
    after = store.submit(lambda c: add_agent(c, "after"))
    gate.set()
    before.result(5)
    after.result(5)
    with pytest.raises(ValueError, match="after the write"):
        failed.result(5)
    with engine.connect() as c:
        assert set(c.scalars(sa.select(schema.agents.c.name))) == {"before", "after"}


def test_a_store_in_trouble_is_told_as_our_own_error(store: GroupCommit, engine: Engine) -> None:
    with pytest.raises(StoreError):
        store.submit(lambda c: c.exec_driver_sql("SELECT * FROM nowhere")).result(5)


def test_slow_preparation_holds_no_lock(store: GroupCommit, engine: Engine) -> None:
    gate, reached = threading.Event(), threading.Event()

    def prepare() -> None:
        reached.set()
        gate.wait(5)

    slow = store.submit(lambda c: add_agent(c, "slow"), prepare)
    assert reached.wait(5)
    with engine.begin() as c:
        add_agent(c, "quick")
    gate.set()
    assert slow.result(5).name == "slow"


def test_a_job_that_was_cancelled_in_time_is_never_run(store: GroupCommit) -> None:
    gate = threading.Event()
    store.submit(lambda _: gate.wait(5))
    ran: list[bool] = []
    unwanted = store.submit(lambda _: ran.append(True))
    assert unwanted.cancel()
    gate.set()
    store.submit(lambda _: None).result(5)
    assert not ran


def test_a_result_that_was_rolled_back_is_given_up(store: GroupCommit, engine: Engine) -> None:
    taken: list[str] = []
    given_up: list[str] = []

    def take(c: sa.Connection) -> str:
        taken.append(f"ticket {len(taken)}")
        return taken[-1]

    def fail(_: sa.Connection) -> None:
        raise ValueError("no")

    gate = threading.Event()
    store.submit(lambda _: gate.wait(5))
    kept = store.submit(take, discard=given_up.append)
    failed = store.submit(fail)
    gate.set()
    assert isinstance(failed.exception(10), ValueError)
    assert kept.result(10) == "ticket 1"
    assert given_up == ["ticket 0"]


@pytest.fixture
def two_processes(postgres_store: Engine) -> Iterator[list[GroupCommit]]:
    """What two gateway workers have, on a real PostgreSQL."""
    stores = [GroupCommit(postgres_store), GroupCommit(postgres_store)]
    yield stores
    for store in stores:
        assert store.close(10)


class Meeting:
    """Lets each of two transactions go on once the other is as far; one that is run again does not wait again."""

    def __init__(self) -> None:
        self.came = [threading.Event(), threading.Event()]
        self.runs = [0, 0]

    def of(self, me: int) -> Callable[[sa.Connection], None]:
        def wait_for_other(_: sa.Connection) -> None:
            self.runs[me] += 1
            self.came[me].set()
            assert self.came[1 - me].wait(10)

        return wait_for_other


def in_one_group(store: GroupCommit, submit: Callable[[], list[Future[Any]]]) -> list[Future[Any]]:
    """Queue several jobs while the thread is busy, so that they share a transaction."""
    gate = threading.Event()
    store.submit(lambda _: None, prepare=gate.wait)
    futures = submit()
    gate.set()
    return futures


@pytest.mark.law(3)
def test_law_3_processes_that_store_traces_of_the_same_agents_in_opposite_order_wait_for_nobody(
    two_processes: list[GroupCommit], postgres_store: Engine
) -> None:
    mark = uuid.uuid4().hex[:8]
    agents = [f"alpha-{mark}", f"beta-{mark}"]
    meeting = Meeting()
    told: list[str] = []

    def submit(me: int) -> list[Future[Any]]:
        writer = TraceWriter(two_processes[me], Quota(None), lambda name, _agent, _n: told.append(name))
        first, second = [a_trace(id=f"{agent}-{me}", agent=agent) for agent in (agents if me else agents[::-1])]
        return [
            writer.submit(first.agent, [first], lambda _: None),
            two_processes[me].submit(meeting.of(me)),
            writer.submit(second.agent, [second], lambda _: None),
        ]

    futures = [f for me in (0, 1) for f in in_one_group(two_processes[me], lambda me=me: submit(me))]  # type: ignore[misc]
    for future in futures:
        future.result(20)
    assert (told, meeting.runs) == ([], [1, 1]), "no transaction was given up"
    with postgres_store.connect() as c:
        counted = read_counters(c, STORED_BYTES)[STORED_BYTES]
    for agent in agents:
        assert counted[agent] == sum(encode_trace(a_trace(id=f"{agent}-{me}", agent=agent))["size"] for me in (0, 1))


@pytest.mark.law(3)
def test_law_3_a_group_that_postgresql_gives_up_is_run_again_at_once_job_by_job(
    two_processes: list[GroupCommit], postgres_store: Engine
) -> None:
    mark = uuid.uuid4().hex[:8]
    meeting = Meeting()

    def submit(me: int) -> list[Future[Any]]:
        rows = ["a", "b"] if me else ["b", "a"]
        first, second = [lambda c, row=row: count(c, f"row-{mark}", row) for row in rows]  # type: ignore[misc]
        store = two_processes[me]
        return [store.submit(first), store.submit(meeting.of(me)), store.submit(second)]

    futures = [f for me in (0, 1) for f in in_one_group(two_processes[me], lambda me=me: submit(me))]  # type: ignore[misc]
    for future in futures:
        future.result(20)
    assert sorted(meeting.runs) == [1, 2], "one of the two was given up"
    with postgres_store.connect() as c:
        assert read_counters(c, f"row-{mark}") == {f"row-{mark}": {"a": 2, "b": 2}}
