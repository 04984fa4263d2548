"""The worker's part in forgetting: old traces, and what the trainer still holds of deleted ones."""

from __future__ import annotations

import asyncio
import time

from metaclaw_plugin.store.deletion import open_recalls, settle_recalls
from metaclaw_plugin.store.retention import retain
from metaclaw_plugin.worker.context import WorkerContext


async def retention_round(ctx: WorkerContext) -> bool:
    """Delete one batch of what need not be kept; True if there may be more."""

    def delete() -> bool:
        with ctx.engine.begin() as c:
            report = retain(c, ctx.settings.store, time.time())
        return bool(report.traces or report.sessions)

    return await asyncio.to_thread(delete)


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
