"""Applies explicit feedback: it may name a response before its trace is stored, and it may come late."""

from __future__ import annotations

import asyncio
import logging
import time

from metaclaw_hooks.rewards.feedback import feedback_reward
from metaclaw_hooks.types import Reward, Trace

from metaclaw_plugin.store import rewards as store
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.store.traces import find_trace, get_trace, rewards_of
from metaclaw_plugin.worker.context import WorkerContext

logger = logging.getLogger(__name__)

AT_ONCE = 200
FORGET_AFTER = 7 * 86_400.0  # seconds that feedback waits for a trace that never comes


async def feedback_round(ctx: WorkerContext) -> int:
    """Apply what is open; returns how many pieces of feedback found their trace.

    Explicit feedback takes the place of what was inferred, unless a ``combine_rewards`` of the owner's says otherwise.
    What was trained on already is not trained on again.
    """

    def waiting() -> list[store.Feedback]:
        with ctx.engine.connect() as c:
            return store.open_feedback(c, AT_ONCE, time.time() - FORGET_AFTER)

    applied = 0
    for item in await asyncio.to_thread(waiting):
        found = await asyncio.to_thread(_enter, ctx, item)
        if found is None:
            continue
        trace, opinions = found
        combined = await ctx.plugins.call_first("combine_rewards", trace=trace, rewards=opinions)
        await asyncio.to_thread(_finish, ctx, item, trace, item.value if combined is None else combined)
        applied += 1
    return applied


def _enter(ctx: WorkerContext, item: store.Feedback) -> tuple[Trace, tuple[Reward, ...]] | None:
    """Store the opinion with its trace; ``None`` if that is not there (yet)."""
    now = time.time()
    with ctx.engine.connect() as c:
        target = find_trace(c, item.agent, item.target)
    if target is None and item.at > now - FORGET_AFTER:
        return None
    with ctx.engine.begin() as c:
        if target is None:
            logger.warning("feedback %s of %s names no trace that ever came; it is dropped", item.id, item.agent)
            count(c, "feedback_unmatched", item.agent)
            store.close_feedback(c, item.id, now)
            return None
        store.hold_trace(c, target)
        store.put_rewards(c, target, [feedback_reward(item.value, item.comment)], now)
        return get_trace(c, target), rewards_of(c, target)


def _finish(ctx: WorkerContext, item: store.Feedback, trace: Trace, combined: float) -> None:
    now = time.time()
    with ctx.engine.begin() as c:
        store.replace_reward(c, trace.id, combined, now)  # one that waits is scored with it in its turn
        store.close_feedback(c, item.id, now)
        count(c, "feedback_applied", item.agent)
