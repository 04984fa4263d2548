"""The threads beside the HTTP server go on whatever breaks in them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from metaclaw_trainer import training
from metaclaw_trainer.errors import StoreError
from metaclaw_trainer.training import TrainingThread


class Loop:
    """Breaks off twice, and then runs until it is stopped."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, stop: threading.Event) -> None:
        self.runs += 1
        if self.runs < 3:
            raise RuntimeError("a bug")
        stop.wait()


class Upkeep:
    """Fails every other time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if self.calls % 2:
            raise StoreError("the store is busy")


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_training_begins_again_and_upkeep_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training, "RESTART_SECONDS", 0.01)
    loop, beat, sweep = Loop(), Upkeep(), Upkeep()
    owner: Any = type("Owner", (), {"heartbeat": staticmethod(beat)})
    sweeper: Any = type("Sweeper", (), {"sweep": staticmethod(sweep)})
    thread = TrainingThread(loop, owner, [sweeper], heartbeat=0.005)  # type: ignore[arg-type]
    thread.start()
    eventually(lambda: loop.runs == 3 and beat.calls > 8 and sweep.calls > 1)
    assert thread.failures == 2
    assert thread.stop(timeout=20)
    assert "the training loop broke off" in caplog.text
    assert "the store is busy" in caplog.text
