"""Rewards that changed after the sample went to the trainer, such as by late feedback.

``told_reward`` is the reward that the trainer has for a trace, as far as it is known. Where it differs from ``reward``
and the trace is not trained yet, the trainer is to be told; telling it twice does no harm.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.schema import traces


def untold(c: Connection, limit: int, not_of: Collection[str] = ()) -> list[tuple[str, float]]:
    """Forwarded traces, those in ``not_of`` left out, whose reward the trainer does not have: id and reward."""
    t = traces.c
    query = sa.select(t.id, t.reward).where(
        t.forward == "forwarded",
        t.score == "scored",
        t.reward.is_not(None),
        sa.or_(t.told_reward.is_(None), t.told_reward != t.reward),
        t.id.not_in(list(not_of)),
    )
    return [(row.id, row.reward) for row in c.execute(query.order_by(t.seq).limit(limit))]


def mark_told(c: Connection, rewards: Sequence[tuple[str, float]]) -> None:
    """The trainer has these rewards, by trace id, or has no more use for them."""
    if rewards:
        known = sa.update(traces).where(traces.c.id == sa.bindparam("of_trace"))
        known = known.values(told_reward=sa.bindparam("of_reward"))
        c.execute(known, [{"of_trace": trace, "of_reward": reward} for trace, reward in rewards])
