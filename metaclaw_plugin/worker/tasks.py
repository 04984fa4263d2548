"""What the worker does, and how often it looks for more of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from metaclaw_plugin.gateway.sessions import close_idle_sessions
from metaclaw_plugin.skills.upkeep import SkillKeeper
from metaclaw_plugin.store.facts import set_fact
from metaclaw_plugin.worker.context import WorkerContext
from metaclaw_plugin.worker.corrections import correction_round
from metaclaw_plugin.worker.feedback import feedback_round
from metaclaw_plugin.worker.forwarding import Forwarder, Tracker
from metaclaw_plugin.worker.judge_book import StoreJudgeBook
from metaclaw_plugin.worker.listing import Lister
from metaclaw_plugin.worker.modes import Modes
from metaclaw_plugin.worker.publishing import Publisher
from metaclaw_plugin.worker.retention import Retention, recall_round
from metaclaw_plugin.worker.scoring import Scorer, settle_side_traces, store_hook_counters

UPKEEP = 5.0  # seconds
HEARTBEAT = "worker_heartbeat"  # fact: owner and time of the worker that was last at work


@dataclass(frozen=True, slots=True)
class Round:
    """One task: ``do`` returns whether there may be more to do at once."""

    name: str
    do: Callable[[], Awaitable[object]]
    every: float  # seconds between rounds without work


def tasks_for(ctx: WorkerContext) -> list[Round]:
    """The tasks that the settings ask for."""
    poll = ctx.settings.worker.poll_interval
    tasks = [
        Round("scoring", Scorer(ctx).round, poll),
        Round("feedback", lambda: feedback_round(ctx), poll),
        Round("sessions", lambda: _close_sessions(ctx), UPKEEP),
        Round("retention", Retention(ctx).round, UPKEEP),
        Round("upkeep", lambda: _upkeep(ctx), UPKEEP),
        Round("skills", SkillKeeper(ctx).round, poll),
    ]
    if ctx.settings.gateway.admin_key is not None:
        tasks.append(Round("listing", Lister(ctx).round, max(poll, 2.0)))
    if ctx.settings.rl.enabled:
        publisher = Publisher(ctx)
        tasks += [
            Round("forwarding", Forwarder(ctx).round, poll),
            Round("corrections", _quietly(lambda: correction_round(ctx)), max(poll, 2.0)),
            Round("tracking", _quietly(Tracker(ctx).round), max(poll, 2.0)),
            Round("publishing", lambda: _publish(publisher, poll), 0.0),
            Round("recalls", lambda: recall_round(ctx), UPKEEP),
            Round("modes", _quietly(Modes(ctx).round), max(poll, 2.0)),
        ]
    return tasks


def _quietly(do: Callable[[], Awaitable[object]]) -> Callable[[], Awaitable[bool]]:
    """For rounds that do everything at once: the next look is after the interval."""

    async def once() -> bool:
        await do()
        return False

    return once


async def _publish(publisher: Publisher, poll: float) -> bool:
    """One round, and the pause after it, which a new version ends."""
    await publisher.round()
    await publisher.wait_for_news(poll)
    return False


async def _close_sessions(ctx: WorkerContext) -> int:
    def close() -> int:
        with ctx.engine.begin() as c:
            return len(close_idle_sessions(c, time.time(), ctx.settings))

    return await asyncio.to_thread(close)


async def _upkeep(ctx: WorkerContext) -> bool:
    def keep() -> bool:
        store_hook_counters(ctx)
        settle_side_traces(ctx)
        StoreJudgeBook(ctx.engine).forget_old()
        with ctx.engine.begin() as c:
            set_fact(c, HEARTBEAT, {"owner": ctx.owner, "at": time.time()})
        return False

    return await asyncio.to_thread(keep)
