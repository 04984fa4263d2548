"""What the rewards would say of a stored trace; nothing is kept."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

import httpx
import sqlalchemy as sa
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import StoreError, UnknownTraceError
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import leases
from metaclaw_plugin.store.schema import traces
from metaclaw_plugin.trainer_client import TrainerClient
from metaclaw_plugin.worker.context import WorkerContext
from metaclaw_plugin.worker.scoring import Claimed, Scorer
from metaclaw_plugin.worker.wiring import load_plugins


async def try_rewards(settings: Settings, engine: Engine, trace_id: str) -> dict[str, Any]:
    """Opinions, failures, silent plugins and the combined reward of the trace, as they would be now.

    Raises:
        UnknownTraceError: if there is no such trace.
        StoreError: if it is damaged.
    """
    plugins = await asyncio.to_thread(load_plugins, settings, engine)
    try:
        async with httpx.AsyncClient(trust_env=False) as http:
            trainer = TrainerClient(http, settings.rl.remote_url)
            scorer = Scorer(WorkerContext(settings, engine, plugins, trainer, http, leases.this_worker()))
            item = await asyncio.to_thread(_load, scorer, engine, trace_id)
            outcome = await scorer.score(item)
    finally:
        plugins.close()
    plan = scorer.plan(item.trace.agent)
    failed = {
        info.name: stats.last_error
        for info in plugins.describe()
        if (stats := info.hooks.get("score_trace")) is not None and stats.failures
    }
    spoken = {reward.source for reward in outcome.rewards} | set(failed)
    return {
        "trace": trace_id,
        "rewards": [asdict(reward) for reward in (*outcome.rewards, *((item.feedback,) if item.feedback else ()))],
        "failed": failed,
        "silent": [name for name in plan.weights if name not in spoken],
        "combined": outcome.combined,
        "hint": outcome.hint,
    }


def _load(scorer: Scorer, engine: Engine, trace_id: str) -> Claimed:
    with engine.connect() as c:
        seq = c.execute(sa.select(traces.c.seq).where(traces.c.id == trace_id)).scalar_one_or_none()
        if seq is None:
            raise UnknownTraceError(f"no trace {trace_id[:80]!r}; `metaclaw traces list` shows them")
        scorer.make_plans(c)
        claimed, broken = scorer.load(c, [seq])
    if broken:
        raise StoreError(broken[0].unusable or f"trace {trace_id} is damaged")
    return claimed[0]
