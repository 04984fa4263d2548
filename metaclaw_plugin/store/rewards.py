"""What was thought of each trace, and what that comes to."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    agent: str
    rewards: tuple[Reward, ...]  # of the plugins; feedback is stored by itself
    combined: float | None  # None: no opinion, so it stays unscored
    hint: str | None
    held_out: bool
    unusable: str | None  # why it can never be trained on
    feedback: float | None  # the explicit feedback that was taken into account


def record_outcomes(c: Connection, outcomes: Sequence[Outcome], owner: str, now: float) -> list[Outcome]:
    """Store outcomes and end their leases; returns those that were stored.

    Nothing is stored of a trace whose lease ``owner`` lost meanwhile. Nor of one on which feedback came in since: that
    is given back, to be scored again with it.
    """
    t, r = traces.c, rewards.c
    mine = sa.select(t.seq, t.purpose, t.forward, t.forward_reason, t.reward).where(
        t.seq.in_([outcome.seq for outcome in outcomes]), t.lease_owner == owner, t.score == "waiting"
    )
    held = {row.seq: row for row in c.execute(mine.with_for_update())}
    said = sa.select(r.trace_id, r.value).where(
        r.trace_id.in_([outcome.trace_id for outcome in outcomes]), r.source == FEEDBACK
    )
    heard = {row.trace_id: row.value for row in c.execute(said)}
    outdated = [o.seq for o in outcomes if o.seq in held and heard.get(o.trace_id) != o.feedback]
    stored = [o for o in outcomes if o.seq in held and heard.get(o.trace_id) == o.feedback]
    if outdated:
        c.execute(sa.update(traces).where(t.seq.in_(outdated)).values(lease_owner=None, lease_until=None))
    if not stored:
        return []
    columns = ("score", "reward", "hint", "purpose", "forward", "forward_reason")
    update = sa.update(traces).where(t.seq == sa.bindparam("of_seq"))
    update = update.values(scored_at=now, lease_owner=None, lease_until=None, **{n: sa.bindparam(n) for n in columns})
    c.execute(update, [{"of_seq": outcome.seq, **_settled(outcome, held[outcome.seq])} for outcome in stored])
    ids = [outcome.trace_id for outcome in stored]
    c.execute(sa.delete(rewards).where(r.trace_id.in_(ids), r.source != FEEDBACK))
    _put(c, [(outcome.trace_id, reward) for outcome in stored for reward in outcome.rewards], now)
    return stored


def _settled(outcome: Outcome, row: Any) -> dict[str, Any]:
    """The worker's columns of a trace after it was scored.

    What was handed over keeps the reward it had if nobody has an opinion any more: its sample cannot be without one.
    """
    reason = "held out for replays" if outcome.held_out else outcome.unusable
    skip = reason is not None and row.forward == "waiting"
    unsettled = row.purpose == Purpose.UNSETTLED.value
    handed_over = row.forward in ("merged", "forwarded")
    reward = row.reward if outcome.combined is None and handed_over else outcome.combined
    return {
        "score": "unscored" if reward is None else "scored",
        "reward": reward,
        "hint": outcome.hint,
        "purpose": Purpose.HELD_OUT.value if outcome.held_out and unsettled else row.purpose,
        "forward": "skipped" if skip else row.forward,
        "forward_reason": (reason or "")[:400] if skip else row.forward_reason,
    }


def put_rewards(c: Connection, trace_id: str, opinions: Iterable[Reward], now: float) -> None:
    """Store opinions about a trace; a newer one of the same source takes the place of the older."""
    _put(c, [(trace_id, reward) for reward in opinions], now)


def _put(c: Connection, opinions: Sequence[tuple[str, Reward]], now: float) -> None:
    if not opinions:
        return
    statement = dialect_insert(c, rewards)
    fresh = {name: statement.excluded[name] for name in ("value", "confidence", "rationale", "hint", "at")}
    rows = [
        {
            "trace_id": trace_id,
            "source": reward.source,
            "value": reward.value,
            "confidence": reward.confidence,
            "rationale": reward.rationale,
            "hint": reward.hint,
            "at": now,
        }
        for trace_id, reward in opinions
    ]
    c.execute(statement.on_conflict_do_update(index_elements=["trace_id", "source"], set_=fresh), rows)


def open_feedback(c: Connection, limit: int, waited_since: float) -> list[Feedback]:
    """Feedback that can be applied now, or was given before ``waited_since``, in the order in which it was given.

    What names no stored trace is left out, so that it cannot stand in the way of the rest.
    """
    f, t = feedback.c, traces.c
    by_id = sa.exists().where(t.id == f.target, t.agent == f.agent)
    by_response = sa.exists().where(t.response_id == f.target, t.agent == f.agent)
    ready = sa.or_(by_id, by_response, f.at <= waited_since)
    query = sa.select(feedback).where(f.applied_at.is_(None), ready).order_by(f.at, f.id).limit(limit)
    found = c.execute(query)
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


def hold_trace(c: Connection, trace_id: str) -> None:
    """Wait for whoever is storing an outcome of this trace, and keep others from it until the transaction ends.

    So an opinion is either seen by the outcome that is being stored, or comes after it (SQLite has one writer anyway).
    """
    c.execute(sa.select(traces.c.seq).where(traces.c.id == trace_id).with_for_update())


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
