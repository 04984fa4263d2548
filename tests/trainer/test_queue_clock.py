"""The trainer's clock is set back: an agent whose step failed does not wait until it has caught up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from metaclaw_hooks.wire import AgentTraining
from metaclaw_trainer.agents import AgentBook
from metaclaw_trainer.sample_queue import Limits, StoredQueue
from metaclaw_trainer.store import open_store

from tests.trainer.engine_parts import random_sample


@pytest.mark.law(5)
def test_a_pause_that_a_fast_clock_began_ends_when_the_clock_is_set_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(f"sqlite:///{tmp_path / 'queue.db'}")
    queue = StoredQueue(store, "test", Limits(vocabulary=49152, max_tokens=4096, max_queued=100, batch_size=1))
    queue.put([random_sample(1)])
    AgentBook(store, 1).set_training("ada", AgentTraining(allowed=True))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600.0)
    queue.claim("ada", 1)
    queue.release(["s1"], "a step that failed")
    assert queue.ready() == [], "a failure is followed by a pause"
    monkeypatch.setattr(time, "time", real)
    assert queue.ready() == [("ada", 1)]
    store.close()
