"""How an agent is doing, from what the store knows."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Mode
from sqlalchemy.engine import Connection

from metaclaw_plugin.store import schema
from metaclaw_plugin.store.agents import get_record

_RECENT = 100  # traces over which the reward is averaged


def agent_overview(c: Connection, name: str, default: Mode) -> dict[str, Any]:
    """Mode, version, sessions, traces, recent reward and counters of the agent ``name``.

    Raises:
        UnknownAgentError: if there is none.
    """
    record = get_record(c, name)
    t, s, r = schema.traces.c, schema.sessions.c, schema.routes.c
    version = c.execute(sa.select(r.version).where(r.agent == name)).scalar_one_or_none()
    open_sessions = sa.select(sa.func.count()).where(s.agent == name, s.closed_at.is_(None))
    counts = sa.select(sa.func.count(), sa.func.max(t.finished_at)).where(t.agent == name)
    traces, last_at = c.execute(counts).one()
    recent = (
        sa.select(t.reward).where(t.agent == name, t.reward.is_not(None)).order_by(t.seq.desc()).limit(_RECENT)
    ).subquery()
    reward = c.execute(sa.select(sa.func.avg(recent.c.reward))).scalar_one()
    counted = sa.select(schema.counters.c.name, schema.counters.c.value).where(schema.counters.c.label == name)
    return {
        "agent": name,
        "mode": record.effective_mode(default).value,
        "model": f"metaclaw/{name}",
        "adapter_version": version or 0,
        "skill_generation": record.skill_generation,
        "recorded": record.record,
        "open_sessions": c.execute(open_sessions.select_from(schema.sessions)).scalar_one(),
        "traces": traces,
        "last_trace_at": last_at,
        "recent_reward": None if reward is None else float(reward),
        "counters": {row.name: row.value for row in c.execute(counted)},
    }
