"""What was thought of each trace, and what that comes to."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from metaclaw_hooks.types import Purpose, Reward
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.engine import dialect_insert
from metaclaw_plugin.store.schema import rewards, traces

FEEDBACK = "feedback"  # source of what someone said explicitly; it wins


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of scoring one trace."""

    seq: int
    trace_id: str
    rewards: tuple[Reward, ...]  # of the plugins; feedback is stored by itself
    combined: float | None  # None: no opinion, so it stays unscored
    hint: str | None
    held_out: bool
    unusable: str | None  # why it can never be trained on
    feedback: float | None  # the explicit feedback that was taken into account


def record_outcome(c: Connection, outcome: Outcome, owner: str, now: float) -> bool:
    """Store an outcome and end the lease; false, and nothing is stored, when ``owner`` lost it meanwhile.

    Feedback that came in since also gives the trace back: it is then scored again, with it.
    """
    t = traces.c
    mine = sa.and_(t.seq == outcome.seq, t.lease_owner == owner, t.score == "waiting")
    heard = sa.select(rewards.c.value).where(rewards.c.trace_id == outcome.trace_id, rewards.c.source == FEEDBACK)
    if c.execute(heard).scalar_one_or_none() != outcome.feedback:
        c.execute(sa.update(traces).where(mine).values(lease_owner=None, lease_until=None))
        return False
    values: dict[str, object] = {
        "score": "unscored" if outcome.combined is None else "scored",
        "reward": outcome.combined,
        "scored_at": now,
        "hint": outcome.hint,
        "lease_owner": None,
        "lease_until": None,
    }
    if outcome.held_out:
        values["purpose"] = sa.case((t.purpose == Purpose.UNSETTLED.value, Purpose.HELD_OUT.value), else_=t.purpose)
    reason = "held out for replays" if outcome.held_out else outcome.unusable
    if reason is not None:
        values["forward"] = sa.case((t.forward == "waiting", "skipped"), else_=t.forward)
        values["forward_reason"] = reason[:400]
    if c.execute(sa.update(traces).where(mine).values(**values)).rowcount != 1:
        return False
    c.execute(sa.delete(rewards).where(rewards.c.trace_id == outcome.trace_id, rewards.c.source != FEEDBACK))
    put_rewards(c, outcome.trace_id, outcome.rewards, now)
    return True


def put_rewards(c: Connection, trace_id: str, opinions: Iterable[Reward], now: float) -> None:
    """Store opinions about a trace; a newer one of the same source takes the place of the older."""
    for reward in opinions:
        values = {
            "value": reward.value,
            "confidence": reward.confidence,
            "rationale": reward.rationale,
            "hint": reward.hint,
            "at": now,
        }
        statement = dialect_insert(c, rewards).values(trace_id=trace_id, source=reward.source, **values)
        c.execute(statement.on_conflict_do_update(index_elements=["trace_id", "source"], set_=values))


def feedback_on(c: Connection, trace_ids: Collection[str]) -> Mapping[str, Reward]:
    """The explicit feedback that was given on these traces, by trace id."""
    r = rewards.c
    found = c.execute(sa.select(rewards).where(r.trace_id.in_(list(trace_ids)), r.source == FEEDBACK))
    return {row.trace_id: Reward(row.source, row.value, row.rationale, row.confidence, row.hint) for row in found}
