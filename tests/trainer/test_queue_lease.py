"""What the worker allows for a while ends by itself, whatever becomes of the worker, of this process or its clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from metaclaw_hooks.types import Sample, SampleTurn
from metaclaw_hooks.wire import AgentTraining
from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.store import Store, open_store
from pydantic import ValidationError


class Trainer:
    """Queue and agents of a trainer that has just started."""

    def __init__(self, folder: Path) -> None:
        self.store: Store = open_store(f"sqlite:///{folder / 'queue.db'}")
        self.queue = StoredQueue(self.store, "test", Limits(vocabulary=100, max_tokens=64, max_queued=9, batch_size=1))
        self.agents = AgentBook(self.store, 1)

    def state(self) -> tuple[bool, bool, int]:
        """Whether the agent would be trained, what its status says of that, and how many samples wait."""
        status = self.agents.status("ada")
        return bool(self.queue.ready()), status.allowed, status.queued


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Trainer]]:
    started: list[Trainer] = []

    def again() -> Trainer:
        started.append(Trainer(tmp_path))
        return started[-1]

    yield again
    for trainer in started:
        trainer.store.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1_000_000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


@pytest.fixture
def trainer(start: Callable[[], Trainer], clock: list[float]) -> Trainer:
    """One with a batch, which the worker has just allowed to be trained for a minute."""
    assert clock
    trainer = start()
    trainer.queue.put([Sample("s1", "ada", "session", (1, 2, 3), (SampleTurn("t1", 1, (-0.5, -0.5), 1.0),), 0, 0)])
    trainer.agents.set_training("ada", AgentTraining(allowed=True, allowed_for=60.0))
    return trainer


def test_a_window_that_nobody_renews_shuts_and_says_so(trainer: Trainer, clock: list[float]) -> None:
    clock[0] += 59.0
    assert trainer.state() == (True, True, 1)
    assert trainer.agents.status("ada").allowed_for == pytest.approx(1.0)
    clock[0] += 1.0
    assert trainer.state() == (False, False, 1)
    status = trainer.agents.status("ada")
    assert status.allowed_for is None
    assert "what the worker allowed has run out" in (status.idle_reason or "")
    trainer.agents.set_training("ada", AgentTraining(allowed=True, allowed_for=60.0))
    assert trainer.state() == (True, True, 1)
    trainer.agents.set_training("ada", AgentTraining(batch_size=1))
    assert trainer.agents.status("ada").allowed_for == pytest.approx(60.0), "what is not said stays as it is"


def test_what_has_no_end_has_none(trainer: Trainer, clock: list[float]) -> None:
    trainer.agents.set_training("ada", AgentTraining(allowed=True))
    clock[0] += 1e6
    assert trainer.state() == (True, True, 1)
    assert trainer.agents.status("ada").allowed_for is None
    trainer.agents.set_training("ada", AgentTraining(allowed=False))
    assert trainer.state() == (False, False, 1)


def test_a_restart_opens_nothing_that_had_run_out(
    trainer: Trainer, start: Callable[[], Trainer], clock: list[float]
) -> None:
    clock[0] += 30.0
    assert start().state() == (True, True, 1)
    clock[0] += 30.0
    assert start().state() == (False, False, 1)


def test_a_clock_that_is_set_back_gives_no_more_time(trainer: Trainer, clock: list[float]) -> None:
    clock[0] -= 3600.0
    assert trainer.state() == (False, False, 1)
    trainer.agents.set_training("ada", AgentTraining(allowed=True, allowed_for=60.0))
    assert trainer.state() == (True, True, 1)


@pytest.mark.parametrize(
    "body",
    [
        {"allowed_for": 60},
        {"allowed": False, "allowed_for": 60},
        {"allowed": True, "allowed_for": 0},
        {"allowed": True, "allowed_for": 1e9},
        {"allowed": True, "allowed_for": float("nan")},
    ],
)
def test_an_end_of_nothing_is_refused(body: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="allowed_for"):
        AgentTraining.model_validate(body)
