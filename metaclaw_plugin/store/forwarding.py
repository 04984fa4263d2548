"""Which traces go to the trainer, and how far each has come.

A trace is settled as query or as support in one transaction, and only an unsettled one can be: so what the evolver was
shown never becomes part of a sample (law 8).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Purpose
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.codec import decode_ids, decode_logprobs
from metaclaw_plugin.store.schema import sessions, traces

_PART = 500  # values in one IN
_OPEN = (Purpose.UNSETTLED.value, Purpose.QUERY.value)
_COLUMNS = (
    traces.c.seq,
    traces.c.id,
    traces.c.agent,
    traces.c.session,
    traces.c.turn,
    traces.c.adapter_version,
    traces.c.skill_generation,
    traces.c.prompt_token_ids,
    traces.c.response_token_ids,
    traces.c.response_logprobs,
    traces.c.reward,
    traces.c.hint,
    traces.c.sample_id,
)


@dataclass(frozen=True, slots=True)
class ScoredTurn:
    """What a sample needs of a scored, trainable trace."""

    seq: int
    trace_id: str
    agent: str
    session: str
    turn: int
    adapter_version: int
    skill_generation: int
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    logprobs: tuple[float, ...]  # one for each token of ``response``
    reward: float
    hint: str | None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.response)

    def extends(self, before: ScoredTurn) -> bool:
        """Whether this turn's prompt begins with all of ``before``: its prompt and its response."""
        cut = len(before.prompt)
        return (
            self.session == before.session
            and self.adapter_version == before.adapter_version
            and len(self.prompt) >= before.length
            and self.prompt[:cut] == before.prompt
            and self.prompt[cut : before.length] == before.response
        )


def agents_with_work(c: Connection) -> list[str]:
    """Agents of which something scored is not forwarded yet, whether it may be or not."""
    t = traces.c
    query = sa.select(t.agent).where(t.forward.in_(("waiting", "merged")), t.score == "scored").distinct()
    return sorted(c.execute(query).scalars())


def mergeable(
    c: Connection, agent: str, now: float, merge_wait: float, limit: int, held: Callable[[str], bool] | None = None
) -> list[ScoredTurn]:
    """Scored, trainable traces of ``agent`` whose session is closed, or has been quiet for ``merge_wait`` seconds.

    A session that is never quiet is taken all the same once its oldest trace has waited for ten times as long. One for
    which ``held(session)`` is true waits until it is closed and scored to its end.
    """
    t, other = traces.c, traces.alias("other").c
    mine = (other.agent == agent, other.forward == "waiting", other.score == "scored", other.session == t.session)
    # What was scored later than now was scored before a clock was set back: it has waited long enough.
    waits = sa.exists().where(*mine, other.scored_at.between(now - merge_wait, now + merge_wait))
    overdue = sa.exists().where(*mine, other.scored_at <= now - 10 * merge_wait)
    closed = sa.exists().where(sessions.c.id == t.session, sessions.c.closed_at.is_not(None))
    due = sa.or_(closed.correlate(traces), ~waits.correlate(traces), overdue.correlate(traces))
    query = sa.select(*_COLUMNS).where(_waiting(agent), *([due] if merge_wait > 0 else []))
    if held is not None:
        unscored = sa.exists().where(other.session == t.session, other.kind == "main", other.score == "waiting")
        unfinished = sa.or_(~closed.correlate(traces), unscored.correlate(traces))
        found = c.execute(sa.select(t.session).where(_waiting(agent), unfinished).distinct()).scalars()
        query = query.where(t.session.not_in([session for session in found if held(session)]))
    return [_turn(row) for row in c.execute(query.order_by(t.seq).limit(limit))]


def mark_merged(c: Connection, samples: Mapping[str, Sequence[ScoredTurn]]) -> list[str]:
    """Settle the turns of each sample, by its id, as query and as merged into it; returns the ids of the samples.

    One of which a trace was taken meanwhile is left out, and its other traces stay as they are.
    """
    t = traces.c
    free: set[int] = set()
    wanted = [turn.seq for run in samples.values() for turn in run]
    for start in range(0, len(wanted), _PART):
        part = wanted[start : start + _PART]
        still = sa.select(t.seq).where(t.seq.in_(part), t.forward == "waiting", t.purpose.in_(_OPEN))
        free.update(c.execute(still.with_for_update()).scalars())
    whole = {name: run for name, run in samples.items() if all(turn.seq in free for turn in run)}
    if whole:
        settle = sa.update(traces).where(t.seq == sa.bindparam("of_seq"))
        settle = settle.values(forward="merged", purpose=Purpose.QUERY.value, sample_id=sa.bindparam("of_sample"))
        c.execute(settle, [{"of_seq": turn.seq, "of_sample": name} for name, run in whole.items() for turn in run])
    return list(whole)


def merged(c: Connection, agent: str, limit: int) -> list[list[ScoredTurn]]:
    """The oldest samples of ``agent`` that are not forwarded yet, as runs of turns, in the order they were made in."""
    t = traces.c
    own = (t.agent == agent, t.forward == "merged")
    last = sa.func.max(t.seq)
    oldest = sa.select(t.sample_id).where(*own).group_by(t.sample_id).order_by(last).limit(limit)
    ids = c.execute(oldest).scalars().all()
    runs: dict[str, list[ScoredTurn]] = {sample: [] for sample in ids}
    query = sa.select(*_COLUMNS).where(t.sample_id.in_(ids), *own).order_by(t.turn, t.seq)
    for row in c.execute(query):
        runs[row.sample_id].append(_turn(row))
    return list(runs.values())


def mark_forwarded(c: Connection, sample_ids: Collection[str]) -> int:
    """The trainer has these samples; returns how many traces they are of."""
    t = traces.c
    done = sa.update(traces).where(t.sample_id.in_(list(sample_ids)), t.forward == "merged")
    return c.execute(done.values(forward="forwarded")).rowcount


def mark_skipped(c: Connection, sample_id: str, reason: str) -> None:
    """This sample will never be trained."""
    t = traces.c
    skip = sa.update(traces).where(t.sample_id == sample_id, t.forward.in_(("merged", "forwarded")))
    c.execute(skip.values(forward="skipped", forward_reason=reason[:400]))


def mark_unusable(c: Connection, seqs: Collection[int], reason: str) -> None:
    """These traces make no sample."""
    t = traces.c
    skip = sa.update(traces).where(t.seq.in_(list(seqs)), t.forward == "waiting")
    c.execute(skip.values(forward="skipped", forward_reason=reason[:400]))


def mark_trained(c: Connection, trace_ids: Collection[str]) -> int:
    """A version has learned from these traces; returns for how many that is new."""
    t = traces.c
    known = sa.update(traces).where(t.id.in_(list(trace_ids)), t.forward.in_(("merged", "forwarded")))
    return c.execute(known.values(forward="trained")).rowcount


def settle_support(c: Connection, trace_ids: Collection[str]) -> list[str]:
    """Settle as support those of the traces that are not settled; returns their ids: only these may be shown."""
    t = traces.c
    free = sa.update(traces).where(
        t.id.in_(list(trace_ids)), t.purpose == Purpose.UNSETTLED.value, t.forward.in_(("waiting", "skipped"))
    )
    reason = sa.case((t.forward == "waiting", "shown to the skill evolver"), else_=t.forward_reason)
    values = {"purpose": Purpose.SUPPORT.value, "forward": "skipped", "forward_reason": reason}
    return list(c.execute(free.values(**values).returning(t.id)).scalars())


def set_aside_generations(c: Connection, agent: str, before: int) -> int:
    """Strict query: what skill generations before ``before`` produced is set aside; returns how many traces."""
    values = {"forward": "skipped", "forward_reason": f"of a skill generation before {before} (strict_query)"}
    old = sa.update(traces).where(_waiting(agent), traces.c.skill_generation < before)
    return c.execute(old.values(**values)).rowcount


def _waiting(agent: str) -> sa.ColumnElement[bool]:
    t = traces.c
    return sa.and_(
        t.forward == "waiting",
        t.score == "scored",
        t.agent == agent,
        t.trainable.is_(True),
        t.kind == "main",
        t.purpose.in_(_OPEN),
        t.reward.is_not(None),
    )


def _turn(row: Any) -> ScoredTurn:
    return ScoredTurn(
        seq=row.seq,
        trace_id=row.id,
        agent=row.agent,
        session=row.session,
        turn=row.turn,
        adapter_version=row.adapter_version,
        skill_generation=row.skill_generation,
        prompt=decode_ids(row.prompt_token_ids) or (),
        response=decode_ids(row.response_token_ids) or (),
        logprobs=decode_logprobs(row.response_logprobs) or (),
        reward=row.reward,
        hint=row.hint,
    )
