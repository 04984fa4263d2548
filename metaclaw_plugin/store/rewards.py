"""What was thought of each trace, and what that comes to."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from metaclaw_hooks.rewards.feedback import SOURCE as FEEDBACK
from metaclaw_hooks.rewards.feedback import feedback_reward
from metaclaw_hooks.types import Purpose, Reward
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.engine import dialect_insert
from metaclaw_plugin.store.schema import feedback, rewards, traces


@dataclass(frozen=True, slots=True)
class Feedback:
    """What someone said about an answer."""

    id: str
    agent: str
    target: str  # trace id, or the response's id that the client saw
    value: float  # in [-1, 1]
    comment: str
    at: float


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


def open_feedback(c: Connection, limit: int) -> list[Feedback]:
    """Feedback that is not applied yet, in the order in which it was given."""
    f = feedback.c
    found = c.execute(sa.select(feedback).where(f.applied_at.is_(None)).order_by(f.at, f.id).limit(limit))
    return [Feedback(row.id, row.agent, row.target, row.value, row.comment, row.at) for row in found]


def add_feedback(c: Connection, agent: str, target: str, value: float, comment: str, now: float) -> str:
    """Queue feedback on the agent's trace, or response, ``target``; returns its id.

    Raises:
        InvalidRewardError: if ``value`` is not in [-1, 1].
    """
    feedback_reward(value, comment)
    made = secrets.token_hex(12)
    row = {"id": made, "agent": agent, "target": target, "value": value, "comment": comment, "at": now}
    c.execute(sa.insert(feedback).values(**row))
    return made


def close_feedback(c: Connection, feedback_id: str, now: float) -> None:
    """This feedback is applied, or never will be."""
    c.execute(sa.update(feedback).where(feedback.c.id == feedback_id).values(applied_at=now))


def replace_reward(c: Connection, trace_id: str, combined: float, now: float) -> bool:
    """Put ``combined`` in the place of what a trace had; false while it still waits to be scored."""
    t = traces.c
    done = sa.update(traces).where(t.id == trace_id, t.score.in_(("scored", "unscored")))
    return c.execute(done.values(score="scored", reward=combined, scored_at=now)).rowcount == 1


def score_again(c: Connection, agent: str, since: float | None = None, trace_id: str | None = None) -> int:
    """Let the agent's traces (finished at or after ``since``) be scored again; returns how many.

    What was trained on already is not trained on again; its new reward counts in figures and curves.
    """
    t = traces.c
    which = [t.agent == agent, t.kind == "main", t.score.in_(("scored", "unscored"))]
    if since is not None:
        which.append(t.finished_at >= since)
    if trace_id is not None:
        which.append(t.id == trace_id)
    values = {"score": "waiting", "lease_owner": None, "lease_until": None}
    return c.execute(sa.update(traces).where(*which).values(**values)).rowcount


def feedback_on(c: Connection, trace_ids: Collection[str]) -> Mapping[str, Reward]:
    """The explicit feedback that was given on these traces, by trace id."""
    r = rewards.c
    found = c.execute(sa.select(rewards).where(r.trace_id.in_(list(trace_ids)), r.source == FEEDBACK))
    return {row.trace_id: Reward(row.source, row.value, row.rationale, row.confidence, row.hint) for row in found}
