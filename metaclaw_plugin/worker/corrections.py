"""Tells the trainer of rewards that changed after it got the sample: what is not trained yet learns from the new one.

The store says which these are, so nothing is forgotten over a restart and a correction that got lost is made again.
"""

from __future__ import annotations

import asyncio
import logging

from metaclaw_plugin.store.corrections import mark_told, untold
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.worker.context import WorkerContext

logger = logging.getLogger(__name__)

AT_ONCE = 1000


async def correction_round(ctx: WorkerContext) -> int:
    """Send the changed rewards; returns how many the trainer now has instead of older ones.

    Raises:
        TrainerUnavailableError: if the trainer does not answer.
        TrainerRefusedError: if it knows no such request.
    """
    in_training: set[str] = set()  # no more to be changed; should its step fail, the next round changes it
    changed = 0
    while rewards := await asyncio.to_thread(_untold, ctx, in_training):
        reply = await ctx.trainer.set_rewards(dict(rewards))
        in_training |= set(reply.in_training)
        told = [(trace, reward) for trace, reward in rewards if trace not in in_training]
        await asyncio.to_thread(_note, ctx, told, len(reply.changed))
        changed += len(reply.changed)
    return changed


def _untold(ctx: WorkerContext, not_of: set[str]) -> list[tuple[str, float]]:
    with ctx.engine.connect() as c:
        return untold(c, AT_ONCE, not_of)


def _note(ctx: WorkerContext, told: list[tuple[str, float]], changed: int) -> None:
    with ctx.engine.begin() as c:
        mark_told(c, told)
        if changed:
            count(c, "rewards_corrected", n=changed)
            logger.info("%d rewards were corrected in the trainer's queue", changed)
