"""Traces into the store: as soon as the answer is whole, a few times over if the store is down, and counted if lost."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Trace

from metaclaw_plugin.capture.group_commit import GroupCommit
from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store.codec import encode_trace
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.store.traces import InsertReport, insert_traces

logger = logging.getLogger(__name__)

LOST = "traces_lost"  # counter: traces that were never stored, by agent
LATE = "commits_late"  # counter: answers whose last byte went out before their trace was stored, by agent
UNRECORDED = "requests_unrecorded"  # counter: requests that went out while the store did not answer, by agent

_RETRY_DELAYS = (0.5, 2.0, 8.0, 30.0)  # seconds
_MOMENT = 0.005  # seconds
_MAX_WAITING = 10_000  # traces held in memory while the store is down

After = Callable[[sa.Connection], None]


@dataclass(slots=True)
class _Batch:
    agent: str
    traces: Sequence[Trace]
    after: After
    attempts: int = 0


class TraceWriter:
    """Stores the traces of one answer at a time. Safe to call from any thread."""

    def __init__(self, store: GroupCommit, max_bytes: int | None, observe: Callable[[str, str, int], None]) -> None:
        """``max_bytes``: quota of the store; ``observe(counter, agent, n)`` is told of what was counted."""
        self._store = store
        self._max_bytes = max_bytes
        self._observe = observe
        self._lock = threading.Lock()
        self._waiting = 0
        self._uncounted: Counter[tuple[str, str]] = Counter()  # what the counters table has yet to be told

    async def write(
        self, agent: str, traces: Sequence[Trace], after: After, patience: float, alone: bool = False
    ) -> bool:
        """Store ``traces`` and run ``after`` in the same transaction; wait at most ``patience`` seconds for it.

        ``alone``: no other request is on its way, so the event loop itself may wait for a moment. Otherwise it would
        first do what LiteLLM has put off until after the answer, which takes longer than the commit.

        False: not stored in time. It is tried further, and counted as lost if that fails for good.
        """
        future = self.submit(agent, traces, after)
        if alone:
            wait([future], timeout=_MOMENT)
        if future.done():
            return future.exception() is None  # without a turn of the event loop, which would do all that first
        waiter = asyncio.wrap_future(future)
        done, _ = await asyncio.wait({waiter}, timeout=patience)
        if not done:
            self.count(LATE, agent, 1)
            waiter.add_done_callback(_consume)
            return False
        return waiter.exception() is None

    def submit(self, agent: str, traces: Sequence[Trace], after: After) -> Future[InsertReport]:
        """Queue ``traces`` without waiting."""
        return self._send(_Batch(agent, traces, after))

    def _send(self, batch: _Batch) -> Future[InsertReport]:
        rows: list[dict[str, Any]] = []
        uncounted = self._take_uncounted()

        def encode() -> None:
            rows.extend(encode_trace(trace) for trace in batch.traces)

        def store(c: sa.Connection) -> InsertReport:
            report = insert_traces(c, rows, self._max_bytes)
            batch.after(c)
            for (name, label), n in uncounted.items():
                count(c, name, label, n)
            return report

        future = self._store.submit(store, prepare=encode)
        future.add_done_callback(lambda done: self._done(done, batch, uncounted))
        return future

    def _done(self, future: Future[InsertReport], batch: _Batch, uncounted: Counter[tuple[str, str]]) -> None:
        error = future.exception()
        if error is None:
            return
        with self._lock:
            self._uncounted.update(uncounted)
        if not isinstance(error, StoreError):
            self._lose(batch, error)
            return
        with self._lock:
            room = self._waiting + len(batch.traces) <= _MAX_WAITING
            if room and batch.attempts < len(_RETRY_DELAYS):
                self._waiting += len(batch.traces)
            else:
                room = False
        if not room:
            self._lose(batch, error)
            return
        timer = threading.Timer(_RETRY_DELAYS[batch.attempts], self._again, [batch])
        timer.daemon = True
        batch.attempts += 1
        timer.start()

    def _again(self, batch: _Batch) -> None:
        with self._lock:
            self._waiting -= len(batch.traces)
        self._send(batch)

    def _lose(self, batch: _Batch, error: BaseException) -> None:
        logger.error(
            "%d trace(s) of agent %s lost, the first is %s: %s",
            len(batch.traces), batch.agent, batch.traces[0].id, error,
        )  # fmt: skip
        self.count(LOST, batch.agent, len(batch.traces))

    def count(self, name: str, agent: str, n: int) -> None:
        """Count ``n`` more of ``name`` now, and in the store's counters with the next trace that is stored."""
        self._observe(name, agent, n)
        with self._lock:
            self._uncounted[name, agent] += n

    def _take_uncounted(self) -> Counter[tuple[str, str]]:
        with self._lock:
            taken, self._uncounted = self._uncounted, Counter()
        return taken


def _consume(waiter: asyncio.Future[InsertReport]) -> None:
    if not waiter.cancelled():
        waiter.exception()
