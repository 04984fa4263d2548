"""The one thread that owns the model, and the only way to it.

Work is a function of the engine, so nothing that belongs to a caller is shared with the thread but what it hands over.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

from metaclaw_trainer.errors import EngineStoppedError, TrainerError
from metaclaw_trainer.lora_engine import LoraEngine
from metaclaw_trainer.settings import TrainerSettings

log = logging.getLogger(__name__)

T = TypeVar("T")
_Job = Callable[[LoraEngine], None]


class EngineThread:
    """Runs submitted work in order, one piece at a time."""

    def __init__(self, settings: TrainerSettings) -> None:
        self._settings = settings
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._ready: Future[None] = Future()
        self._closing = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="lora-engine", daemon=True)

    def start(self) -> None:
        """Start the thread and wait until the base model is loaded.

        Raises:
            ModelLoadError: if it cannot be.
        """
        self._thread.start()
        self._ready.result()

    def submit(self, work: Callable[[LoraEngine], T]) -> Future[T]:
        """Run ``work`` in the thread; its result or error comes with the future.

        Raises:
            EngineStoppedError: if the thread has been stopped.
        """
        future: Future[T] = Future()

        def job(engine: LoraEngine) -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = work(engine)
            except BaseException as error:  # noqa: BLE001 - an error belongs to whoever asked, not to the thread
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._closing:
            if self._closed:
                raise EngineStoppedError("the trainer is shutting down: nothing more is computed")
            self._jobs.put(job)
        return future

    def call(self, work: Callable[[LoraEngine], T]) -> T:
        """``submit`` and wait."""
        return self.submit(work).result()

    def stop(self, timeout: float | None = None) -> bool:
        """Finish what was submitted, then end; returns whether the thread has ended in time."""
        with self._closing:
            if not self._closed:
                self._closed = True
                self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._lower_priority()
            engine = LoraEngine(self._settings)
        except (TrainerError, OSError, RuntimeError) as error:
            with self._closing:
                self._closed = True
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while (job := self._jobs.get()) is not None:
            job(engine)

    def _lower_priority(self) -> None:
        # On Linux a nice value belongs to a thread, and the arithmetic threads that torch starts inherit it: the HTTP
        # side of this process and, on a shared machine, serving stay first.
        if self._settings.nice:
            os.nice(self._settings.nice)
        if self._settings.torch_threads:
            torch.set_num_threads(self._settings.torch_threads)
