"""Reads for pages: each touches a bounded number of rows, however many traces the store holds.

What is counted is therefore counted among an agent's newest traces, or up to a cap, and a long history is sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.schema import adapters, sessions, traces

NEWEST = 100  # traces of an agent that its figures are about
CAP = 1_000  # up to which things are counted
WHOLE = 3_000  # traces of an agent whose curve is made of all of them
RANGES = 60  # of a longer history, and how many traces are read at the start of each
IN_RANGE = 50
DECIDED = 20  # newest versions of an agent among which the last decision is looked for

_T = traces.c
_NEWEST = (
    sa.select(
        _T.seq,
        _T.id,
        _T.session,
        _T.turn,
        _T.kind,
        _T.adapter_version,
        _T.finished_at,
        _T.trainable,
        _T.reason,
        _T.score,
        _T.reward,
        _T.purpose,
        _T.forward,
    )
    .where(_T.agent == sa.bindparam("agent"), _T.seq < sa.bindparam("before"))
    .order_by(_T.seq.desc())
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
_POINT = sa.select(_T.seq, _T.finished_at, _T.reward, _T.kind)
_RANGE = (
    _POINT.where(_T.agent == sa.bindparam("agent"), _T.seq >= sa.bindparam("first"), _T.seq < sa.bindparam("end"))
    .order_by(_T.seq)
    .limit(sa.bindparam("limit", type_=sa.Integer))
)
_FIRST_SEQ = 2**62


@dataclass(frozen=True, slots=True)
class Newest:
    """One of an agent's newest traces, without what was said in it."""

    seq: int
    id: str
    session: str
    turn: int
    kind: str
    adapter_version: int
    finished_at: float
    trainable: bool
    reason: str | None
    score: str
    reward: float | None
    purpose: str
    forward: str


@dataclass(frozen=True, slots=True)
class Decided:
    """What the worker or the owner decided about a version."""

    number: int
    decision: Mapping[str, Any]
    at: float | None


@dataclass(frozen=True, slots=True)
class History:
    """An agent's rewards over its life, oldest first: (finished_at, reward), of all its traces or a sample of them."""

    points: tuple[tuple[float, float], ...]
    sampled: bool


def newest_traces(c: Connection, agent: str, limit: int = NEWEST, before: int | None = None) -> list[Newest]:
    """The agent's newest traces, newest first; of those before the trace ``before`` (a ``seq``) if given."""
    values = {"agent": agent, "limit": limit, "before": _FIRST_SEQ if before is None else before}
    return [Newest(**row) for row in c.execute(_NEWEST, values).mappings()]


def count_capped(c: Connection, rows: sa.Select[tuple[int]]) -> int:
    """How many ``rows`` there are; ``CAP`` stands for that many or more."""
    return c.execute(sa.select(sa.func.count()).select_from(rows.limit(CAP).subquery())).scalar_one()


def count_traces(c: Connection, agent: str) -> int:
    """How many traces the agent has, up to ``CAP``."""
    return count_capped(c, sa.select(_T.seq).where(_T.agent == agent))


def count_unforwarded(c: Connection, agent: str) -> int:
    """How many of the agent's scored traces wait to go to the trainer, up to ``CAP``."""
    waiting = sa.select(_T.seq).where(_T.forward.in_(("waiting", "merged")), _T.score == "scored", _T.agent == agent)
    return count_capped(c, waiting)


def reward_history(c: Connection, agent: str) -> History:
    """The agent's rewards: all; past ``WHOLE`` traces, of the first ``IN_RANGE`` in each of ``RANGES`` equal ranges."""
    everything = {"agent": agent, "first": 0, "end": _FIRST_SEQ, "limit": WHOLE + 1}
    rows: list[Any] = list(c.execute(_RANGE, everything))
    sampled = len(rows) > WHOLE
    if sampled:
        first = rows[0].seq
        last = c.execute(sa.select(sa.func.max(_T.seq)).where(_T.agent == agent)).scalar_one()
        edges = [first + (last + 1 - first) * step // RANGES for step in range(RANGES + 1)]
        rows = [
            row
            for start, end in pairwise(edges)
            for row in c.execute(_RANGE, {"agent": agent, "first": start, "end": end, "limit": IN_RANGE})
        ]
    found = tuple((row.finished_at, float(row.reward)) for row in rows if row.reward is not None and row.kind == "main")
    return History(found, sampled)


def newest_decision(c: Connection, agent: str) -> Decided | None:
    """The newest decision about one of the agent's ``DECIDED`` newest versions; ``None`` if none was decided about."""
    a = adapters.c
    newest = sa.select(a.number, a.decision, a.decided_at).where(a.agent == agent).order_by(a.number.desc())
    rows = [Decided(row.number, row.decision or {}, row.decided_at) for row in c.execute(newest.limit(DECIDED))]
    return max((row for row in rows if row.at is not None), key=lambda row: row.at or 0.0, default=None)


def newest_version_numbers(c: Connection, agent: str, limit: int) -> list[int]:
    """Numbers of the agent's newest adapter versions, newest first."""
    query = sa.select(adapters.c.number).where(adapters.c.agent == agent).order_by(adapters.c.number.desc())
    return list(c.execute(query.limit(limit)).scalars())


def find_session_row(c: Connection, session: str) -> sa.Row[tuple[object, ...]] | None:
    """The row of a session; ``None`` if there is none."""
    return c.execute(sa.select(sessions).where(sessions.c.id == session)).one_or_none()


def place_of(c: Connection, trace_id: str) -> tuple[str, int] | None:
    """A trace's session, and how many of the session's traces come before it; ``None`` if there is no such trace."""
    row = c.execute(sa.select(_T.session, _T.turn, _T.seq).where(_T.id == trace_id)).one_or_none()
    if row is None:
        return None
    earlier = sa.or_(_T.turn < row.turn, sa.and_(_T.turn == row.turn, _T.seq < row.seq))
    count = sa.select(sa.func.count()).select_from(traces).where(_T.session == row.session, earlier)
    return str(row.session), c.execute(count).scalar_one()
