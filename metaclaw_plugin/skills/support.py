"""Which traces the evolver may see (law 8), and which it has seen.

A failed trace is kept together with what it builds on: all that its prompt repeats of its session. They are settled as
support before anything of the session is forwarded, or not at all; what was forwarded already is never shown.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Agent, Mode, Purpose
from sqlalchemy.engine import Connection

from metaclaw_plugin.settings import EvolutionSettings
from metaclaw_plugin.store.engine import insert_or_ignore
from metaclaw_plugin.store.forwarding import settle_support
from metaclaw_plugin.store.schema import sessions, skill_rounds, skill_support, traces

MAX_ATTEMPTS = 3  # rounds that may fail with a trace before it is given up
_LOOKED_AT = 50  # failed traces that are looked at in one go
_TRAINS = (Mode.RL, Mode.AUTO)


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """One question to the evolver, as it is kept."""

    id: str
    agent: str
    state: str  # applied, proposed, nothing or failed
    model: str
    prompt_version: str
    trace_ids: Sequence[str]
    detail: Mapping[str, Any]
    generation: int
    seconds: float
    at: float


def reserve_support(
    c: Connection, agent: Agent, settings: EvolutionSettings, now: float, since: float = 0.0
) -> list[str]:
    """Settle failures of ``agent``, scored after ``since``, as support; returns their trace ids.

    Of an agent that trains, only `support_share` of the failed sessions are kept, the same ones whoever asks: the
    trainer needs failures too. ``c`` must be a writing transaction.
    """
    room = 4 * settings.max_traces - len(pending(c, agent.name))
    reserved: list[str] = []
    for row in failures(c, agent.name, settings.failure_reward, since) if room > 0 else []:
        if len(reserved) == room:
            break
        share = settings.support_share if agent.mode in _TRAINS else 1.0
        if not is_kept(row.session, share):
            continue
        wanted = _built_on(c, row.session, row.turn)
        with c.begin_nested() as savepoint:
            if wanted is None or set(settle_support(c, wanted)) != set(wanted):
                savepoint.rollback()
                continue
            rows = [
                {
                    "trace_id": trace,
                    "agent": agent.name,
                    "session": row.session,
                    "failed": trace == row.id,
                    "round": None,
                    "attempts": 0,
                    "at": now,
                }
                for trace in wanted
            ]
            insert_or_ignore(c, skill_support, rows)
        reserved.append(str(row.id))
    return reserved


def failures(c: Connection, agent: str, up_to: float, since: float) -> Sequence[Any]:
    """Traces of ``agent`` with a reward up to ``up_to``, scored after ``since``, that are not settled: the newest."""
    t, s = traces.c, skill_support.c
    query = sa.select(t.id, t.session, t.turn).where(
        t.agent == agent,
        t.kind == "main",
        t.score == "scored",
        t.reward <= up_to,
        t.scored_at > since,
        t.purpose == Purpose.UNSETTLED.value,
        t.forward.in_(("waiting", "skipped")),
        ~sa.exists().where(s.trace_id == t.id),
    )
    return c.execute(query.order_by(t.seq.desc()).limit(_LOOKED_AT)).all()


def pending(c: Connection, agent: str) -> list[str]:
    """Failed traces of ``agent`` that are reserved and not shown yet, oldest first."""
    s = skill_support.c
    query = sa.select(s.trace_id).where(s.agent == agent, s.round.is_(None), s.failed.is_(True))
    there = query.join(traces, traces.c.id == s.trace_id).order_by(s.at, s.trace_id)
    return [str(found) for found in c.execute(there).scalars()]


def is_due(c: Connection, agent: str, settings: EvolutionSettings, now: float) -> bool:
    """Whether the evolver should be asked now: enough failures, enough turns, or a session with one has ended."""
    waiting = pending(c, agent)
    if not waiting or _backs_off(c, agent, now):
        return False
    if len(waiting) >= settings.min_failures:
        return True
    s, t, e = skill_support.c, traces.c, sessions.c
    if settings.at_session_end:
        ended = sa.select(s.trace_id).join(sessions, e.id == s.session)
        if c.execute(ended.where(s.trace_id.in_(waiting), e.closed_at.is_not(None)).limit(1)).first() is not None:
            return True
    if settings.every_turns is None:
        return False
    last = sa.select(sa.func.max(skill_rounds.c.at)).where(skill_rounds.c.agent == agent).scalar_subquery()
    scored = sa.select(sa.func.count()).where(t.agent == agent, t.scored_at > sa.func.coalesce(last, 0.0))
    return int(c.execute(scored).scalar_one()) >= settings.every_turns


def finish_round(c: Connection, record: RoundRecord) -> None:
    """Keep what became of a round, and what was shown in it; a failed one gives its traces back a few times."""
    c.execute(sa.insert(skill_rounds).values(**_row(record)))
    s = skill_support.c
    shown = sa.select(s.session).where(s.trace_id.in_(list(record.trace_ids))).scalar_subquery()
    mine = sa.and_(s.agent == record.agent, s.round.is_(None), s.session.in_(shown))
    if record.state == "failed":
        update = sa.update(skill_support).where(mine).values(attempts=s.attempts + 1)
        c.execute(update)
        mine = sa.and_(mine, s.attempts >= MAX_ATTEMPTS)
    c.execute(sa.update(skill_support).where(mine).values(round=record.id))


def rounds(c: Connection, agent: str | None = None, limit: int = 20) -> list[RoundRecord]:
    """The latest rounds, newest first."""
    query = sa.select(skill_rounds).order_by(skill_rounds.c.at.desc()).limit(limit)
    if agent is not None:
        query = query.where(skill_rounds.c.agent == agent)
    return [RoundRecord(**row) for row in c.execute(query).mappings()]


def _row(record: RoundRecord) -> dict[str, Any]:
    names = RoundRecord.__slots__
    return {name: getattr(record, name) for name in names} | {"trace_ids": list(record.trace_ids)}


def _built_on(c: Connection, session: str, turn: int) -> Collection[str] | None:
    """The main traces of ``session`` up to ``turn`` that are not settled; ``None`` if anything of it may be trained."""
    t = traces.c
    rows = c.execute(sa.select(t.id, t.turn, t.purpose, t.forward).where(t.session == session, t.kind == "main")).all()
    if any(row.purpose == Purpose.QUERY or row.forward in ("merged", "forwarded", "trained") for row in rows):
        return None
    return [row.id for row in rows if row.turn <= turn and row.purpose != Purpose.SUPPORT]


def is_kept(session: str, share: float) -> bool:
    """Whether the failures of ``session`` are for the evolver, if ``share`` of all are; the same whoever asks."""
    digest = hashlib.sha256(f"support\0{session}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _backs_off(c: Connection, agent: str, now: float) -> bool:
    """Whether the last rounds failed so recently that the next one waits: a minute, then twice as long each time."""
    failed = 0
    newest: float | None = None
    for record in rounds(c, agent, limit=8):
        if record.state != "failed":
            break
        newest = newest or record.at
        failed += 1
    return newest is not None and now < newest + 60.0 * 2 ** (failed - 1)
