"""The worker's part in forgetting: old traces, and what the trainer still holds of deleted ones."""

from __future__ import annotations

import asyncio
import time

from metaclaw_plugin.store.deletion import open_recalls, settle_recalls
from metaclaw_plugin.store.retention import due, retain, sweep_sessions
from metaclaw_plugin.worker.context import WorkerContext

SWEEP = 3600.0  # seconds between looks for sessions that hold nothing


class Retention:
    """Deletes in small steps, and takes the store's write lock only when there is something to delete."""

    def __init__(self, ctx: WorkerContext) -> None:
        self._ctx = ctx
        self._next_sweep = time.monotonic()

    async def round(self) -> bool:
        """Delete one batch of what need not be kept; True if there may be more."""
        return await asyncio.to_thread(self._once)

    def _once(self) -> bool:
        engine, settings = self._ctx.engine, self._ctx.settings.store
        more = False
        with engine.connect() as c:
            needed = due(c, settings, time.time())
        if needed:
            with engine.begin() as c:
                more = retain(c, settings, time.time()).traces > 0
        if time.monotonic() >= self._next_sweep:
            with engine.begin() as c:
                swept = sweep_sessions(c, time.time()).sessions
            more = more or swept > 0
            if not swept:
                self._next_sweep = time.monotonic() + SWEEP
        return more


async def recall_round(ctx: WorkerContext) -> bool:
    """Have the trainer forget deleted traces; True if there may be more.

    Raises:
        TrainerUnavailableError: if it does not answer; the traces stay noted.
    """

    def find() -> list[str]:
        with ctx.engine.connect() as c:
            return open_recalls(c)

    traces = await asyncio.to_thread(find)
    if not traces:
        return False
    reply = await ctx.trainer.recall(traces)

    def settle() -> None:
        with ctx.engine.begin() as c:
            settle_recalls(c, traces, reply)

    await asyncio.to_thread(settle)
    return True
