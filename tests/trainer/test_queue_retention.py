"""The disk budget of adapter versions, and what of a sample is kept when it is settled."""

from __future__ import annotations

from pathlib import Path

import pytest
from metaclaw_hooks.types import AdapterVersion, Sample, SampleTurn
from metaclaw_trainer.owners import Owner
from metaclaw_trainer.retention import Retention
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.schema import samples, versions
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
    assert home.retention(7).sweep() == ["alpha@v1", "alpha@v2", "beta@v1"]
    assert (home.there("alpha"), home.there("beta")) == ({3, 4, 5}, {2, 3, 4, 5})
    assert home.retention(7).sweep() == []


def test_what_serves_and_where_training_goes_on_stays_whatever_the_budget(home: Home) -> None:
    home.make("alpha", 8)
    home.versions.set_served(["alpha@v2", "alpha@v4"])
    home.versions.put_head("alpha", 3)
    home.retention(0).sweep()
    assert home.there("alpha") == {2, 3, 4, 6, 7, 8}
    assert home.versions.set_served(["alpha@v1", "alpha@v2"]) == {"alpha@v1": "its files were removed to save space"}


def test_a_removal_that_was_interrupted_is_finished(home: Home) -> None:
    home.make("alpha", 5)
    retention = home.retention(0)
    assert retention._mark("alpha", 1)
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
