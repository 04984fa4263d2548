"""The threads that run beside the HTTP server: the training loop, and upkeep (heartbeat, disk budget, old rows)."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from metaclaw_trainer.errors import TrainerError
from metaclaw_trainer.loop import TrainingLoop
from metaclaw_trainer.owners import Owner

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
SWEEP_EVERY = 6  # heartbeats
RESTART_SECONDS = 5.0


class Sweeper(Protocol):
    """Clears away what is too much or too old."""

    def sweep(self) -> object: ...


class TrainingThread:
    """Trains in the background until stopped."""

    def __init__(
        self, loop: TrainingLoop, owner: Owner, sweepers: Sequence[Sweeper], heartbeat: float = HEARTBEAT_SECONDS
    ) -> None:
        self._loop = loop
        self._owner = owner
        self._sweepers = sweepers
        self._heartbeat = heartbeat
        self.failures = 0  # times that the loop broke off
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._train, name="training", daemon=True),
            threading.Thread(target=self._keep_up, name="upkeep", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout: float) -> bool:
        """Take up no further batch; whether the running step, if any, has ended within ``timeout`` seconds."""
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout)
        return not any(thread.is_alive() for thread in self._threads)

    def _train(self) -> None:
        while not self._stop.is_set():
            try:
                self._loop.run(self._stop)
                return
            except Exception:  # a boundary: whatever it was, training must not end without a word
                self.failures += 1
                log.exception("the training loop broke off; it begins again in %d s", RESTART_SECONDS)
                self._stop.wait(RESTART_SECONDS)

    def _keep_up(self) -> None:
        beats = 0
        while not self._stop.wait(self._heartbeat):
            due: list[Callable[[], object]] = [self._owner.heartbeat]
            if beats % SWEEP_EVERY == 0:
                due += [sweeper.sweep for sweeper in self._sweepers]
            for job in due:
                try:
                    job()
                except TrainerError as error:
                    log.error("upkeep failed, and is tried again: %s", error)
            beats += 1
