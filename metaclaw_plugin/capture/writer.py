"""Traces into the store: as soon as the answer is whole, a few times over if the store is down, and counted if lost."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Trace

from metaclaw_plugin.capture.group_commit import GroupCommit
from metaclaw_plugin.capture.quota import Quota
from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store.codec import encode_trace
from metaclaw_plugin.store.traces import OVER_QUOTA, InsertReport

logger = logging.getLogger(__name__)

LOST = "traces_lost"  # counter: traces that were never stored, by agent
LATE = "commits_late"  # counter: answers whose last byte went out before their trace was stored, by agent
UNRECORDED = "requests_unrecorded"  # counter: requests that went out while the store did not answer, by agent

_RETRY_DELAYS = (0.5, 2.0, 8.0, 30.0)  # seconds
_COUNT_AGAIN = 2.0  # seconds until the store is asked once more to take what was counted
_MOMENT = 0.005  # seconds
_MAX_WAITING = 10_000  # traces held in memory while the store is down

After = Callable[[sa.Connection], None]
Counted = Counter[tuple[str, str]]  # by counter and agent


class Written(StrEnum):
    """What had become of an answer's traces when its last byte went out; the label ``stored`` of the metrics."""

    STORED = "yes"
    OVER_QUOTA = "over_quota"
    LATE = "no"  # tried further, and counted as lost if that fails for good


@dataclass(slots=True, eq=False)
class _Batch:
    agent: str
    traces: Sequence[Trace]
    after: After
    attempts: int = 0


class TraceWriter:
    """Stores the traces of one answer at a time. Safe to call from any thread."""

    def __init__(self, store: GroupCommit, quota: Quota, observe: Callable[[str, str, int], None]) -> None:
        """``observe(counter, agent, n)`` is told of what is counted, at once; the store as soon as it takes writes."""
        self._store = store
        self._quota = quota
        self._observe = observe
        self._lock = threading.Lock()
        self._waiting: dict[_Batch, threading.Timer] = {}  # to be tried again
        self._held = 0  # traces in these
        self._uncounted: Counted = Counter()  # what the counters table has yet to be told
        self._telling = False  # a job that tells it is on its way
        self._closing = False

    async def write(
        self, agent: str, traces: Sequence[Trace], after: After, patience: float, alone: bool = False
    ) -> Written:
        """Store ``traces`` and run ``after`` in the same transaction; wait at most ``patience`` seconds for it.

        ``alone``: no other request is on its way, so the event loop itself may wait for a moment. Otherwise it would
        first do what LiteLLM has put off until after the answer, which takes longer than the commit.
        """
        future = self.submit(agent, traces, after)
        if alone:
            wait([future], timeout=_MOMENT)
        if not future.done():  # or else without a turn of the event loop, which would do all that first
            waiter = asyncio.wrap_future(future)
            waiter.add_done_callback(_consume)
            await asyncio.wait({waiter}, timeout=patience)
        if not future.done() or future.exception() is not None:
            self.count(LATE, agent, 1)
            return Written.LATE
        return Written.OVER_QUOTA if future.result().over_quota else Written.STORED

    def submit(self, agent: str, traces: Sequence[Trace], after: After) -> Future[InsertReport]:
        """Queue ``traces`` without waiting."""
        return self._send(_Batch(agent, traces, after))

    def count(self, name: str, agent: str, n: int) -> None:
        """Count ``n`` more of ``name`` now, and in the store's counters as soon as it takes writes."""
        self._observe(name, agent, n)
        with self._lock:
            self._uncounted[name, agent] += n
            if self._telling or self._closing:
                return
            self._telling = True
        self._tell()

    def close(self, timeout: float) -> bool:
        """Try once more what waits, and tell the store what was counted; False if that did not end in time."""
        deadline = time.monotonic() + timeout
        with self._lock:
            if self._closing:
                return True
            self._closing = True
            waiting, self._waiting, self._held = self._waiting, {}, 0
        for timer in waiting.values():
            timer.cancel()
        done, _ = wait([self._send(batch) for batch in waiting], timeout)
        told, _ = wait([self._submit_counts()], max(0.0, deadline - time.monotonic()))
        with self._lock:
            left = {f"{name} of {agent}": n for (name, agent), n in self._uncounted.items() if n}
        if left:
            logger.error("the store did not take what was counted: %s; see its disk and locks", left)
        return len(done) == len(waiting) and bool(told)

    def _send(self, batch: _Batch) -> Future[InsertReport]:
        rows: list[dict[str, Any]] = []

        def encode() -> None:
            rows.extend(encode_trace(trace) for trace in batch.traces)

        def store(c: sa.Connection) -> InsertReport:
            report = self._quota.insert(c, rows)
            batch.after(c)
            return report

        future = self._store.submit(store, prepare=encode, counts=lambda report: report.counts)
        future.add_done_callback(lambda done: self._done(done, batch))
        return future

    def _done(self, future: Future[InsertReport], batch: _Batch) -> None:
        error = future.exception()
        if error is None:
            if refused := len(future.result().over_quota):
                self._observe(OVER_QUOTA, batch.agent, refused)
        elif not isinstance(error, StoreError) or not self._wait_for_another_try(batch):
            self._lose(batch, error)

    def _wait_for_another_try(self, batch: _Batch) -> bool:
        with self._lock:
            room = self._held + len(batch.traces) <= _MAX_WAITING
            if self._closing or not room or batch.attempts >= len(_RETRY_DELAYS):
                return False
            self._held += len(batch.traces)
            timer = self._waiting[batch] = _timer(_RETRY_DELAYS[batch.attempts], lambda: self._again(batch))
            batch.attempts += 1
        timer.start()
        return True

    def _again(self, batch: _Batch) -> None:
        with self._lock:
            if self._waiting.pop(batch, None) is None:
                return
            self._held -= len(batch.traces)
        self._send(batch)

    def _lose(self, batch: _Batch, error: BaseException) -> None:
        logger.error(
            "%d trace(s) of agent %s lost, the first is %s: %s",
            len(batch.traces), batch.agent, batch.traces[0].id, error,
        )  # fmt: skip
        self.count(LOST, batch.agent, len(batch.traces))

    def _tell(self) -> None:
        self._submit_counts().add_done_callback(self._told)

    def _submit_counts(self) -> Future[Counted]:
        return self._store.submit(self._take_uncounted, discard=self._put_back, counts=lambda taken: taken)

    def _told(self, future: Future[Counted]) -> None:
        with self._lock:
            self._telling = bool(self._uncounted) and not self._closing
            if not self._telling:
                return
        if future.exception() is None:
            self._tell()
        else:
            _timer(_COUNT_AGAIN, self._tell).start()

    def _take_uncounted(self, _: sa.Connection) -> Counted:
        with self._lock:
            taken, self._uncounted = self._uncounted, Counter()
        return taken

    def _put_back(self, taken: Counted) -> None:
        with self._lock:
            self._uncounted.update(taken)


def _timer(delay: float, work: Callable[[], None]) -> threading.Timer:
    timer = threading.Timer(delay, work)
    timer.daemon = True
    return timer


def _consume(waiter: asyncio.Future[InsertReport]) -> None:
    if not waiter.cancelled():
        waiter.exception()
