"""The disk budget of adapter versions and session checkpoints, and how long settled samples are kept."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from metaclaw_hooks.types import AdapterVersion, Sample, SampleTurn
from metaclaw_trainer.owners import Owner
from metaclaw_trainer.removable import VersionFiles
from metaclaw_trainer.retention import Forgetting, Retention
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.schema import issued_paths, recalled_traces, run_weights, sample_traces, samples, versions
from metaclaw_trainer.store import Store, open_store
from metaclaw_trainer.versions import StoredVersions

SIZE = 1000  # bytes of each version


class Home:
    """A trainer's folder with versions in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store: Store = open_store(f"sqlite:///{folder / 'queue.db'}")
        owner = Owner(self.store, folder / "owners", 900)
        self.queue = StoredQueue(self.store, owner.id, Limits(100, 100, 100, 1))
        self.versions = StoredVersions(self.store, owner.id)

    def make(self, agent: str, count: int) -> None:
        for _ in range(count):
            head = self.versions.head(agent)
            number = head.newest + 1
            name = f"{agent}-{number}"
            self.queue.put(
                [Sample(name, agent, "s", (1, 2), (SampleTurn(f"t-{name}", 1, (-1.0,), 1.0),), 0, 0, "hint")]
            )
            path = self.folder / "adapters" / agent / f"v{number}"
            path.mkdir(parents=True)
            (path / "adapter_model.safetensors").write_bytes(b"x" * SIZE)
            made = AdapterVersion(
                agent, number, "base", head.head, (f"t-{name}",), number, {}, "0" * 64, {}, str(path), float(number)
            )
            ids = [s.id for s in self.queue.claim(agent, 1)]
            assert self.versions.commit(made, ids, head.generation)

    def issue(self, session: str, name: str, at: float, kind: str = "checkpoints") -> Path:
        """A folder that a session was given at ``at`` (Unix seconds)."""
        path = self.folder / "runs" / session / kind / name
        path.mkdir(parents=True)
        (path / "adapter_model.safetensors").write_bytes(b"x" * SIZE)
        row = {"path": str(path), "session_id": session, "caller": "", "kind": kind, "size": SIZE, "at": at}
        with self.store.write() as c:
            c.execute(issued_paths.insert().values(**row))
        return path

    def there(self, agent: str) -> set[int]:
        return {int(p.name[1:]) for p in (self.folder / "adapters" / agent).glob("v*")}

    def retention(self, kept: int) -> Retention:
        return Retention(self.store, self.folder, kept * SIZE)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_the_oldest_versions_go_until_the_rest_fits(home: Home) -> None:
    home.make("alpha", 5)
    home.make("beta", 5)
    assert home.retention(10).sweep() == []
    assert home.retention(7).sweep() == ["alpha@v1", "beta@v1", "alpha@v2"]
    assert (home.there("alpha"), home.there("beta")) == ({3, 4, 5}, {2, 3, 4, 5})
    assert home.retention(7).sweep() == []


def test_what_serves_and_where_training_goes_on_stays_whatever_the_budget(home: Home) -> None:
    home.make("alpha", 8)
    home.versions.set_served(["alpha@v2", "alpha@v4"])
    home.versions.put_head("alpha", 3)
    home.retention(0).sweep()
    assert home.there("alpha") == {2, 3, 4, 6, 7, 8}
    assert home.versions.set_served(["alpha@v1", "alpha@v2"]) == {"alpha@v1": "its files were removed to save space"}


def test_what_the_worker_may_go_back_to_stays_and_is_not_loaded(home: Home) -> None:
    home.make("alpha", 8)
    assert home.versions.set_served(["alpha@v7"], ["alpha@v2", "alpha@v99"]) == {}
    assert [wanted.name for wanted in home.versions.served()] == ["alpha@v7"]
    source = VersionFiles(home.store)
    with home.store.read() as c:
        third = source.candidates(c)[1]
    home.versions.set_served(["alpha@v7"], ["alpha@v2", "alpha@v3"])  # while v3 is about to be removed
    assert not source.mark(third)
    home.retention(0).sweep()
    assert home.there("alpha") == {2, 3, 6, 7, 8}
    home.versions.set_served(["alpha@v7"], ["alpha@v3"])
    home.retention(0).sweep()
    assert home.there("alpha") == {3, 6, 7, 8}


def test_a_removal_that_was_interrupted_is_finished(home: Home) -> None:
    home.make("alpha", 5)
    source = VersionFiles(home.store)
    with home.store.read() as c:
        [oldest, *_] = source.candidates(c)
    assert source.mark(oldest)
    assert 1 in home.there("alpha")
    home.retention(100).sweep()
    assert 1 not in home.there("alpha")


def test_nothing_outside_the_folder_is_ever_removed(home: Home, tmp_path_factory: pytest.TempPathFactory) -> None:
    home.make("alpha", 5)
    outside = tmp_path_factory.mktemp("outside")
    with home.store.write() as c:
        c.execute(versions.update().where(versions.c.number == 1).values(path=str(outside)))
    home.retention(0).sweep()
    assert outside.is_dir()


def test_a_budget_that_cannot_be_kept_is_said_once(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    home.make("alpha", 3)
    retention = home.retention(1)
    for _ in range(3):
        retention.sweep()
    assert caplog.text.count("disk_budget_gib") == 1
    assert home.there("alpha") == {1, 2, 3}


def test_tokens_are_kept_only_as_long_as_they_may_be_trained_on(home: Home) -> None:
    home.make("alpha", 1)
    for name in ("aside", "skipped", "waiting"):
        home.queue.put([Sample(name, "alpha", "s", (1, 2), (SampleTurn(f"t-{name}", 1, (-1.0,), 1.0),), 0, 0, "hint")])
    home.queue.set_aside([home.queue.claim("alpha", 1)[0].id], "too old")
    home.versions.skipped("alpha", [home.queue.claim("alpha", 1)[0].id], "no signal")
    with home.store.read() as c:
        kept = {row.id: row.token_ids is not None and row.hint is not None for row in c.execute(samples.select())}
    assert kept == {"alpha-1": False, "aside": False, "skipped": False, "waiting": True}
    again = home.queue.put([Sample("aside", "alpha", "s", (1, 2), (SampleTurn("t-aside", 1, (-1.0,), 1.0),), 0, 0)])
    assert again.duplicate == ["aside"]


def test_checkpoints_of_sessions_count_too_and_the_newest_of_one_at_work_stays(home: Home) -> None:
    home.make("alpha", 5)  # made at 1 to 5: older than any checkpoint here
    now = time.time()
    busy = [home.issue("busy", f"c{i}", now - 100 + i) for i in range(3)]
    idle = [home.issue("idle", f"c{i}", now - 200_000 + i) for i in range(2)]
    assert home.retention(10).sweep() == []
    assert home.retention(7).sweep() == ["alpha@v1", "alpha@v2", "session idle c0"]
    assert [path.is_dir() for path in (*busy, *idle)] == [True, True, True, False, True]
    assert home.retention(0).sweep() == ["session idle c1", "session busy c0", "session busy c1"]
    assert [path.is_dir() for path in (*busy, *idle)] == [False, False, True, False, False]
    assert home.there("alpha") == {3, 4, 5}


def test_what_killed_processes_left_of_sessions_is_removed(home: Home) -> None:
    old = time.time() - 10_000
    lost, kept = home.issue("lost", "w1", old, "weights"), home.issue("kept", "w1", old, "weights")
    fresh = home.issue("fresh", "w1", time.time(), "weights")  # its session is about to say that it is wanted
    with home.store.write() as c:
        row = {"session_id": "kept", "name": "run.kept.1", "path": str(kept), "owner": "me"}
        c.execute(run_weights.insert().values(**row))
    halves = [kept.parent / ".w2.0123", kept.parent / ".w3.0123"]
    for half in halves:
        half.mkdir()
    os.utime(halves[0], (old, old))
    home.retention(100).sweep()
    assert [path.is_dir() for path in (lost, kept, fresh, *halves)] == [False, True, True, False, True]


def test_settled_samples_are_forgotten_after_their_time_and_lineage_is_not(home: Home) -> None:
    home.make("alpha", 2)
    home.queue.put([Sample("new", "alpha", "s", (1, 2), (SampleTurn("t-new", 1, (-1.0,), 1.0),), 0, 0)])
    home.queue.recall(["t-gone"])
    assert Forgetting(home.store, 30).sweep() == 0
    long_ago = time.time() - 31 * 86_400
    with home.store.write() as c:
        c.execute(samples.update().where(samples.c.id == "alpha-1").values(settled_at=long_ago))
        c.execute(samples.update().where(samples.c.id == "new").values(received_at=long_ago))  # waits still
        c.execute(recalled_traces.update().values(at=long_ago))
    assert Forgetting(home.store, 30).sweep() == 1
    with home.store.read() as c:
        assert {row.id for row in c.execute(samples.select())} == {"alpha-2", "new"}
        assert {row.trace_id for row in c.execute(sample_traces.select())} == {"t-alpha-2", "t-new"}
        assert not c.execute(recalled_traces.select()).all()
    removed, learned = home.queue.recall(["t-alpha-1"])
    assert (removed, learned) == ([], ["alpha@v1", "alpha@v2"])
