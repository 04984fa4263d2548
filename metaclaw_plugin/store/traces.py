"""Traces in, traces out.

Written once by the gateway (an id that is there already is left alone, so a commit may be tried again), read by the
worker and by whoever owns them. Reading goes by pages of ``seq``, so that memory does not grow with the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.types import Reward, Session, Trace
from sqlalchemy.engine import Connection, RowMapping

from metaclaw_plugin.errors import UnknownSessionError, UnknownTraceError
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.codec import decode_trace, encode_trace
from metaclaw_plugin.store.counters import count_all
from metaclaw_plugin.store.engine import insert_or_ignore

STORED_BYTES = "stored_bytes"  # counter: bytes of each agent's traces in the store
OVER_QUOTA = "traces_over_quota"  # counter: traces of each agent that were not stored for want of quota
_PAGE = 100  # traces held in memory at once

# Built once, since every stored trace asks it.
_STORED = sa.select(sa.func.coalesce(sa.func.sum(schema.counters.c.value), 0)).where(
    schema.counters.c.name == sa.bindparam("name")
)


@dataclass(frozen=True, slots=True)
class TraceFilter:
    """Which traces; what is ``None`` does not narrow. Times compare with ``finished_at``."""

    agent: str | None = None
    session: str | None = None
    id: str | None = None
    since: float | None = None  # at or after
    until: float | None = None  # before
    after_seq: int | None = None
    up_to_seq: int | None = None  # and this one

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        """The WHERE clause, to be joined by AND."""
        t = schema.traces.c
        found: list[sa.ColumnElement[bool]] = []
        for column, value in ((t.agent, self.agent), (t.session, self.session), (t.id, self.id)):
            if value is not None:
                found.append(column == value)
        if self.since is not None:
            found.append(t.finished_at >= self.since)
        if self.until is not None:
            found.append(t.finished_at < self.until)
        if self.after_seq is not None:
            found.append(t.seq > self.after_seq)
        if self.up_to_seq is not None:
            found.append(t.seq <= self.up_to_seq)
        return found


@dataclass(frozen=True, slots=True)
class InsertReport:
    """What became of traces that were to be stored."""

    stored: tuple[str, ...]  # ids that are new in the store
    known: tuple[str, ...]  # ids that were there already
    over_quota: tuple[str, ...]  # ids that were not stored for want of quota
    counts: Mapping[tuple[str, str], int]  # what it adds to the counters, by name and label

    @property
    def bytes(self) -> int:
        """Bytes that the traces which are new in the store take."""
        return sum(n for (name, _), n in self.counts.items() if name == STORED_BYTES)


@dataclass(frozen=True, slots=True)
class StoredTrace:
    """A trace with what the worker made of it."""

    seq: int
    trace: Trace
    score: str
    reward: float | None
    scored_at: float | None
    hint: str | None
    forward: str
    sample_id: str | None
    rewards: tuple[Reward, ...]


def insert_traces(
    c: Connection, traces: Sequence[Trace | Mapping[str, Any]], max_bytes: int | None = None
) -> InsertReport:
    """Store ``traces`` and count them.

    Past ``max_bytes`` of stored traces in all, further ones are counted and not stored.

    Raises:
        StoreError: if a trace cannot be encoded.
    """
    report = add_traces(c, traces, None if max_bytes is None else max_bytes - stored_bytes(c))
    count_all(c, report.counts)
    return report


def add_traces(c: Connection, traces: Sequence[Trace | Mapping[str, Any]], room: int | None) -> InsertReport:
    """Store ``traces`` (or rows that ``encode_trace`` made of them before, to hold the write lock for less long).

    Those for which ``room``, in bytes, does not suffice are left out. The report's ``counts`` are the caller's to
    write, last in its transaction.

    Raises:
        StoreError: if a trace cannot be encoded.
    """
    stored: list[str] = []
    known: list[str] = []
    refused: list[str] = []
    counts: Counter[tuple[str, str]] = Counter()
    for row in [encode_trace(item) if isinstance(item, Trace) else item for item in traces]:
        if room is not None and row["size"] > room:
            refused.append(row["id"])
            counts[OVER_QUOTA, row["agent"]] += 1
            continue
        if not insert_or_ignore(c, schema.traces, [row]):
            known.append(row["id"])
            continue
        stored.append(row["id"])
        counts[STORED_BYTES, row["agent"]] += row["size"]
        room = None if room is None else room - row["size"]
    return InsertReport(tuple(stored), tuple(known), tuple(refused), counts)


def stored_bytes(c: Connection) -> int:
    """Bytes of all stored traces: bodies and token columns, without indexes."""
    return int(c.execute(_STORED, {"name": STORED_BYTES}).scalar_one())


def get_trace(c: Connection, trace_id: str) -> Trace:
    """The trace ``trace_id``.

    Raises:
        UnknownTraceError: if there is none.
    """
    row = c.execute(sa.select(schema.traces).where(schema.traces.c.id == trace_id)).mappings().one_or_none()
    if row is None:
        raise UnknownTraceError(f"no trace {trace_id[:80]!r}; `metaclaw traces list` shows them")
    return decode_trace(row)


def get_stored(c: Connection, trace_id: str) -> StoredTrace:
    """The trace ``trace_id`` with its rewards.

    Raises:
        UnknownTraceError: if there is none.
    """
    for stored in iter_stored(c, TraceFilter(id=trace_id)):
        return stored
    raise UnknownTraceError(f"no trace {trace_id[:80]!r}; `metaclaw traces list` shows them")


def iter_traces(
    c: Connection,
    agent: str | None = None,
    session: str | None = None,
    since: float | None = None,
    until: float | None = None,
    after_seq: int | None = None,
    limit: int | None = None,
) -> Iterator[Trace]:
    """The traces that all given conditions hold for, in the order in which they were stored."""
    where = TraceFilter(agent=agent, session=session, since=since, until=until, after_seq=after_seq)
    for row in _pages(c, where, limit):
        yield decode_trace(row)


def iter_stored(c: Connection, where: TraceFilter, limit: int | None = None) -> Iterator[StoredTrace]:
    """Traces with their rewards, in the order in which they were stored."""
    for row in _pages(c, where, limit):
        yield StoredTrace(
            seq=row["seq"],
            trace=decode_trace(row),
            score=row["score"],
            reward=row["reward"],
            scored_at=row["scored_at"],
            hint=row["hint"],
            forward=row["forward"],
            sample_id=row["sample_id"],
            rewards=rewards_of(c, row["id"]),
        )


def rewards_of(c: Connection, trace_id: str) -> tuple[Reward, ...]:
    """All opinions about a trace, by source."""
    r = schema.rewards
    query = sa.select(r).where(r.c.trace_id == trace_id).order_by(r.c.source)
    return tuple(Reward(row.source, row.value, row.rationale, row.confidence, row.hint) for row in c.execute(query))


def find_trace(c: Connection, agent: str, target: str) -> str | None:
    """Id of the agent's trace whose id, or whose response's id, is ``target``; the newest, if several are."""
    t = schema.traces.c
    for column in (t.id, t.response_id):
        query = sa.select(t.id).where(column == target, t.agent == agent).order_by(t.seq.desc()).limit(1)
        found = c.execute(query).scalar_one_or_none()
        if found is not None:
            return str(found)
    return None


def load_session(c: Connection, session_id: str) -> Session:
    """The session with all of its traces, in order.

    Raises:
        UnknownSessionError: if there is none.
    """
    query = sa.select(schema.sessions).where(schema.sessions.c.id == session_id)
    row = c.execute(query).one_or_none()
    if row is None:
        raise UnknownSessionError(f"no session {session_id[:80]!r}")
    t = schema.traces
    rows = c.execute(sa.select(t).where(t.c.session == session_id).order_by(t.c.turn, t.c.seq)).mappings()
    return Session(
        id=row.id,
        agent=row.agent,
        started_at=row.started_at,
        last_at=row.last_at,
        closed_at=row.closed_at,
        held_out=row.held_out,
        traces=tuple(decode_trace(found) for found in rows),
    )


def _pages(c: Connection, where: TraceFilter, limit: int | None) -> Iterator[RowMapping]:
    t = schema.traces
    conditions = where.conditions()
    after, left = -1, limit
    while left is None or left > 0:
        size = _PAGE if left is None else min(_PAGE, left)
        query = sa.select(t).where(t.c.seq > after, *conditions).order_by(t.c.seq).limit(size)
        rows = c.execute(query).mappings().all()
        yield from rows
        if len(rows) < size:
            return
        after = rows[-1]["seq"]
        left = None if left is None else left - len(rows)
