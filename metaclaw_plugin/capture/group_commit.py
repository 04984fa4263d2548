"""One thread that does all of a gateway process's writing, many requests to a transaction.

A job is a function of an open connection. Jobs that wait together are run and committed together, each inside a
savepoint of its own, so that one that fails takes no other with it; a job alone fails with its transaction. A future is
fulfilled only after the commit.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError

from metaclaw_plugin.errors import StoreError

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_GROUP = 64  # jobs to a transaction


@dataclass(slots=True)
class _Job:
    run: Callable[[sa.Connection], Any]
    prepare: Callable[[], None] | None
    future: Future[Any] = field(default_factory=Future)
    result: Any = None
    error: Exception | None = None


class GroupCommit:
    """Runs jobs in order in a thread of its own. Safe to call from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="metaclaw-store", daemon=True)
        self._thread.start()

    def submit(self, run: Callable[[sa.Connection], T], prepare: Callable[[], None] | None = None) -> Future[T]:
        """Queue a job; never blocks. The future raises what the job raised, or StoreError if nothing was committed.

        ``prepare`` is called in the thread first, before the transaction begins, so that slow work holds no lock.
        A future that is cancelled before its job's turn takes the job out.
        """
        job = _Job(run, prepare)
        self._jobs.put(job)
        return job.future

    def close(self, timeout: float) -> bool:
        """Do what is queued, then stop; False if that took longer than ``timeout`` seconds."""
        self._jobs.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            group, last = self._next_group()
            group = [job for job in group if job.future.set_running_or_notify_cancel()]
            ready = [job for job in group if _prepared(job)]
            if ready:
                self._commit(ready)
            if last:
                return

    def _next_group(self) -> tuple[list[_Job], bool]:
        group: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            group.append(job)
            if len(group) >= MAX_GROUP:
                return group, False
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return group, False
        return group, True

    def _commit(self, group: list[_Job]) -> None:
        try:
            with self._engine.begin() as c:
                for job in group:
                    _run(c, job, alone=len(group) == 1)
        except _FailedAloneError:
            pass  # rolled back, and told to whoever waits below
        except Exception as error:  # noqa: BLE001 - isolation boundary: the thread must outlive any failure of the store
            logger.warning("a transaction of %d jobs failed: %s", len(group), type(error).__name__)
            for job in group:
                failure = StoreError(
                    f"the store did not take the write: {type(error).__name__}; see its disk and locks"
                )
                failure.__cause__ = error
                job.future.set_exception(failure)
            return
        for job in group:
            if job.error is not None:
                job.future.set_exception(job.error)
            else:
                job.future.set_result(job.result)


def _prepared(job: _Job) -> bool:
    try:
        if job.prepare is not None:
            job.prepare()
    except Exception as error:  # noqa: BLE001 - isolation boundary: told to whoever submitted the job, not to the others
        job.future.set_exception(error)
        return False
    return True


class _FailedAloneError(Exception):
    """The only job of a group failed, so that its transaction is rolled back instead of a savepoint."""


def _run(c: sa.Connection, job: _Job, alone: bool) -> None:
    try:
        with nullcontext() if alone else c.begin_nested():
            job.result = job.run(c)
    except (OperationalError, InterfaceError):
        raise  # the store itself is in trouble: no job of this group is safe
    except SQLAlchemyError as error:
        job.error = StoreError(f"the store refused a write: {type(error).__name__}")
        job.error.__cause__ = error
    except Exception as error:  # noqa: BLE001 - isolation boundary: told to whoever submitted the job, not to the others
        job.error = error
    if alone and job.error is not None:
        raise _FailedAloneError
