"""One day in mode ``auto``, on a clock of the test's own: the worker's windows, and the trainer's loop and store."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import pytest
from metaclaw_hooks.plugins import Plugins, create_plugin_manager
from metaclaw_hooks.types import AdapterVersion, Mode, Sample, SampleTurn
from metaclaw_hooks.wire import AgentStatus, AgentTraining
from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.loop import TrainingLoop
from metaclaw_trainer.owners import Owner
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.settings import TrainerSettings
from metaclaw_trainer.store import open_store as open_trainer_store
from metaclaw_trainer.versions import StoredVersions
from sqlalchemy.engine import Engine

from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store.agents import add_agent, set_settings
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.last_requests import note_requests
from metaclaw_plugin.worker.modes import LEASE, Modes

QUARTER = 15  # minutes
BATCH = 8
MONDAY = datetime(2026, 11, 23, tzinfo=ZoneInfo("Europe/Berlin")).timestamp()
MEETING = """BEGIN:VCALENDAR
VERSION:2.0
PRODID:-//test//EN
BEGIN:VEVENT
UID:standup
DTSTART;TZID=Europe/Berlin:20261102T100000
DTEND;TZID=Europe/Berlin:20261102T110000
RRULE:FREQ=WEEKLY;BYDAY=MO
END:VEVENT
END:VCALENDAR
"""


class Trainer:
    """The rooms of one trainer, asked directly instead of over HTTP."""

    def __init__(self, settings: TrainerSettings) -> None:
        self.engine = EngineThread(settings)
        self.engine.start()
        self.store = open_trainer_store(settings.store_url)
        owner = Owner(self.store, settings.folder / "owners", 900)
        self.queue = StoredQueue(self.store, owner.id, Limits(49152, 4096, 1000, settings.batch_size))
        self.book = AgentBook(self.store, settings.batch_size)
        self.versions = CommittedVersions(self.store, owner.id)
        self.loop = TrainingLoop(self.engine, self.queue, self.versions, settings)

    async def agents(self) -> list[AgentStatus]:
        return self.book.statuses()

    async def set_agent(self, agent: str, training: AgentTraining) -> AgentStatus:
        return self.book.set_training(agent, training)


class CommittedVersions(StoredVersions):
    """Lets something happen in the middle of a step: when it is computed and not yet listed."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.before_commit = lambda: None

    def commit(self, version: AdapterVersion, *given: Any) -> bool:
        self.before_commit()
        return super().commit(version, *given)


@dataclass
class House:
    """What a worker would hand to its task ``modes``, and a clock."""

    settings: Settings
    engine: Engine
    trainer: Trainer
    plugins: Plugins
    http: httpx.AsyncClient
    minute: int = 0  # since midnight
    sent: int = 0
    made_at: list[int] = field(default_factory=list)

    @property
    def now(self) -> float:
        return MONDAY + self.minute * 60

    def send(self, count: int) -> None:
        """Samples of the base model's, so that neither their age nor their log-probs matter here."""
        chance = random.Random(self.sent)
        samples = []
        for _ in range(count):
            tokens = tuple(chance.randrange(2000) for _ in range(10))
            turn = SampleTurn(f"t{self.sent}", 6, (-8.0,) * 4, chance.choice((1.0, -1.0)))
            samples.append(Sample(f"s{self.sent}", "ada", f"session-{self.sent}", tokens, (turn,), 0, 0))
            self.sent += 1
        assert len(self.trainer.queue.put(samples).accepted) == count

    async def train(self) -> None:
        """What the trainer's thread does all the time: steps, for as long as there is one to take."""
        while await asyncio.to_thread(self.trainer.loop.run_once):
            self.made_at.append(self.minute)

    def status(self) -> AgentStatus:
        return self.trainer.book.status("ada")


@pytest.fixture
def house(tiny_model: Path, tmp_path: Path) -> Iterator[House]:
    settings = TrainerSettings.model_validate(
        {
            "base_model": str(tiny_model), "home": tmp_path, "device": "cpu", "dtype": "float32", "rank": 2, "nice": 0,
            "torch_threads": 1, "targets": ["q_proj"], "batch_size": BATCH, "gap_threshold": 1000.0,
            "max_staleness": 1000, "kl_coefficient": 0.0,
        }
    )  # fmt: skip
    trainer = Trainer(settings)
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    calendar = tmp_path / "work.ics"
    calendar.write_text(MEETING, encoding="utf-8")
    windows = {"hours": ["23:00-06:30"], "time_zone": "Europe/Berlin", "calendar": str(calendar), "idle_after": 7200}
    with engine.begin() as c:
        add_agent(c, "ada", Mode.AUTO)
        set_settings(c, "ada", {"windows": windows})
        note_requests(c, {"ada": 0.0})
    plugins = create_plugin_manager(packages=False)
    yield House(Settings(home=tmp_path), engine, trainer, plugins, httpx.AsyncClient(trust_env=False))
    plugins.close()
    trainer.engine.stop()
    trainer.store.close()
    engine.dispose()


async def test_a_day_in_which_auto_trains_inside_its_windows_alone(house: House) -> None:
    modes = Modes(house, clock=lambda: house.now)
    for house.minute in range(0, 24 * 60, QUARTER):
        if 7 * 60 <= house.minute < 20 * 60:  # someone talks to the agent, from 7 in the morning to 8 in the evening
            house.send(2)
            with house.engine.begin() as c:
                note_requests(c, {"ada": house.now})
        await modes.round()
        await house.train()
    assert house.made_at
    assert all(_open(minute) for minute in house.made_at), house.made_at
    meeting, evening = 10 * 60, 21 * 60 + 45  # the first looks at which a batch was full and a window open
    assert sorted(set(house.made_at)) == [meeting, 10 * 60 + 45, evening]
    status = house.status()
    assert status.trained + status.queued == house.sent == 104
    assert (status.trained, status.newest, len(house.made_at)) == (104 // BATCH * BATCH, 13, 13)


async def test_a_window_that_closes_in_the_middle_of_a_step_lets_it_end_and_nothing_is_lost(house: House) -> None:
    modes, loop = Modes(house, clock=lambda: house.now), asyncio.get_running_loop()
    house.minute = 6 * 60 + 15
    house.send(3 * BATCH)
    await modes.round()

    def close() -> None:
        house.minute = 8 * 60
        with house.engine.begin() as c:
            note_requests(c, {"ada": house.now})
        asyncio.run_coroutine_threadsafe(modes.round(), loop).result(30)

    house.trainer.versions.before_commit = close
    await house.train()
    status = house.status()
    assert (status.newest, status.trained, status.queued, status.allowed) == (1, BATCH, 2 * BATCH, False)
    assert "mode or window" in (status.idle_reason or "")
    house.trainer.versions.before_commit = lambda: None
    house.minute = 23 * 60
    await modes.round()
    await house.train()
    status = house.status()
    assert (status.newest, status.trained, status.queued) == (3, 3 * BATCH, 0)


async def test_a_worker_that_dies_in_a_window_leaves_it_to_shut_by_itself(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, real = Modes(house, clock=lambda: house.now), time.time
    house.minute = 6 * 60 + 15
    house.send(3 * BATCH)
    await modes.round()
    house.trainer.versions.before_commit = lambda: monkeypatch.setattr(time, "time", lambda: real() + LEASE)
    await house.train()
    status = house.status()
    assert (status.newest, status.trained, status.queued, status.allowed) == (1, BATCH, 2 * BATCH, False)
    assert "has run out" in (status.idle_reason or "")
    house.trainer.versions.before_commit = lambda: None
    await modes.round()
    await house.train()
    assert (house.status().trained, house.status().queued) == (3 * BATCH, 0)


def _open(minute: int) -> bool:
    asleep = minute < 6 * 60 + 30 or minute >= 23 * 60
    meeting = 10 * 60 <= minute < 11 * 60
    idle = minute < 7 * 60 or minute >= 19 * 60 + 45 + 120  # the last word falls at 19:45
    return asleep or meeting or idle
