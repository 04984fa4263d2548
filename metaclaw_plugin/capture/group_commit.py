"""One thread that does all of a gateway process's writing, many requests to a transaction.

A job is a function of an open connection. Jobs that wait together are run and committed together. If one of them
fails, all is rolled back and each is run once more in a transaction of its own, so that it takes no other with it:
failures are rare, and a savepoint for every job would not be. A future is fulfilled only after the commit.

Other gateway processes do the same on the same rows. What the jobs of a group add to the counters is therefore summed
and written last. Where two groups meet on rows all the same, PostgreSQL gives one of them up; it is run again at once.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store.counters import count_all

logger = logging.getLogger(__name__)

T = TypeVar("T")
MAX_GROUP = 64  # jobs to a transaction
_TRIES = 5  # for a job by itself that others get in the way of
_GIVEN_UP = frozenset({"40P01", "40001"})  # SQLSTATEs: deadlock, serialization failure; nothing is wrong with the store

Counts = Mapping[tuple[str, str], int]  # counter and label -> what is added


@dataclass(slots=True)
class _Job:
    run: Callable[[sa.Connection], Any]
    prepare: Callable[[], None] | None
    discard: Callable[[Any], None] | None
    counts: Callable[[Any], Counts] | None
    future: Future[Any] = field(default_factory=Future)
    results: list[Any] = field(default_factory=list)  # one, while its transaction is open

    def roll_back(self) -> None:
        if self.results and self.discard is not None:
            self.discard(self.results[0])
        self.results.clear()


class GroupCommit:
    """Runs jobs in order in a thread of its own. Safe to call from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="metaclaw-store", daemon=True)
        self._thread.start()

    def submit(
        self,
        run: Callable[[sa.Connection], T],
        prepare: Callable[[], None] | None = None,
        discard: Callable[[T], None] | None = None,
        counts: Callable[[T], Counts] | None = None,
    ) -> Future[T]:
        """Queue a job; never blocks. The future raises what the job raised, or StoreError if nothing was committed.

        ``prepare`` is called in the thread first, before the transaction begins, so that slow work holds no lock.
        ``run`` may be called again after a rollback; ``discard`` is given each result that was rolled back. ``counts``
        says what a result adds to the counters, written in the same transaction; ``run`` itself counts nothing.
        A future that is cancelled before its job's turn takes the job out.
        """
        job = _Job(run, prepare, discard, counts)
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

    def _commit(self, group: Sequence[_Job], tries: int = _TRIES) -> None:
        try:
            with self._engine.begin() as c:
                for job in group:
                    job.results.append(job.run(c))
                count_all(c, _counts(group))
        except Exception as error:  # noqa: BLE001 - isolation boundary: the thread must outlive any failure of the store
            for job in group:
                job.roll_back()
            self._after_rollback(group, error, tries)
            return
        for job in group:
            job.future.set_result(job.results[0])

    def _after_rollback(self, group: Sequence[_Job], error: Exception, tries: int) -> None:
        given_up = _sqlstate(error) in _GIVEN_UP
        if len(group) > 1 and (given_up or not isinstance(error, OperationalError | InterfaceError)):
            for job in group:
                self._commit([job])
        elif given_up and tries > 1:
            self._commit(group, tries - 1)
        else:
            logger.warning("a transaction of %d jobs failed: %s", len(group), type(error).__name__)
            for job in group:
                job.future.set_exception(_failure(error))


def _counts(group: Sequence[_Job]) -> Counts:
    together: Counter[tuple[str, str]] = Counter()
    for job in group:
        if job.counts is not None:
            together.update(job.counts(job.results[0]))
    return together


def _sqlstate(error: Exception) -> str | None:
    """PostgreSQL's code for what went wrong."""
    state = getattr(error.orig, "sqlstate", None) if isinstance(error, DBAPIError) else None
    return state if isinstance(state, str) else None


def _failure(error: Exception) -> Exception:
    """What a job's future raises: what the job itself raised, or that the store did not take it."""
    if not isinstance(error, SQLAlchemyError):
        return error
    trouble = isinstance(error, OperationalError | InterfaceError)
    said = "did not take the write" if trouble else "refused a write"
    failure = StoreError(f"the store {said}: {type(error).__name__}; see its disk and locks")
    failure.__cause__ = error
    return failure


def _prepared(job: _Job) -> bool:
    try:
        if job.prepare is not None:
            job.prepare()
    except Exception as error:  # noqa: BLE001 - isolation boundary: told to whoever submitted the job, not to the others
        job.future.set_exception(error)
        return False
    return True
