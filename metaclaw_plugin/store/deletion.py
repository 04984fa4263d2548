"""Deletion, complete and reported.

What goes: the traces, their rewards and feedback, and of sessions that are left without a trace the chain and the
injected blocks as well. What went to the trainer is noted for recall; the worker carries that out. Work is done in
small transactions, so that no answer waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields

import sqlalchemy as sa
from metaclaw_hooks.wire import RecallReply
from sqlalchemy.engine import Connection, Engine

from metaclaw_plugin.store import schema
from metaclaw_plugin.store.counters import count, count_all
from metaclaw_plugin.store.engine import insert_or_ignore
from metaclaw_plugin.store.forwarding import mark_skipped
from metaclaw_plugin.store.traces import STORED_BYTES, TraceFilter

TRAINED_AND_DELETED = "trained_traces_deleted"  # counter: deleted traces that a version had learned from, by version
BY_OWNER, BY_RETENTION = "owner", "retention"  # why a trace was deleted
_BATCH = 200  # traces to a transaction
_QUIET = 600.0  # seconds after its last request until a session is sure to have nothing in flight


@dataclass(frozen=True, slots=True)
class DeletionReport:
    """How much was deleted."""

    traces: int = 0
    bytes: int = 0
    rewards: int = 0
    feedback: int = 0
    sessions: int = 0  # left empty by it
    chain: int = 0  # places where these could have gone on
    injections: int = 0
    recalls: int = 0  # traces that the trainer is to forget
    sent: tuple[tuple[str, str], ...] = ()  # agent and id of each of these

    def __add__(self, other: DeletionReport) -> DeletionReport:
        return DeletionReport(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def delete_traces(c: Connection, where: TraceFilter, limit: int = _BATCH, *, cause: str = BY_OWNER) -> DeletionReport:
    """Delete the oldest ``limit`` traces that ``where`` holds for; call again until the report says none."""
    t = schema.traces
    columns = (t.c.seq, t.c.id, t.c.response_id, t.c.agent, t.c.session, t.c.size, t.c.sample_id)
    query = sa.select(*columns).where(*where.conditions()).order_by(t.c.seq).limit(limit)
    rows = c.execute(query).all()
    if not rows:
        return DeletionReport()
    ids = [row.id for row in rows]
    sent = [row for row in rows if row.sample_id is not None]
    now = time.time()
    recalls = [{"trace_id": row.id, "agent": row.agent, "cause": cause, "at": now} for row in sent]
    recalled = insert_or_ignore(c, schema.recalls, recalls)
    samples = {row.sample_id for row in sent}
    # What was merged with a deleted trace and not sent yet is merged anew.
    unsent = sa.update(t).where(t.c.sample_id.in_(samples), t.c.forward == "merged", t.c.id.not_in(ids))
    c.execute(unsent.values(forward="waiting", sample_id=None, lease_owner=None, lease_until=None))
    targets = ids + [row.response_id for row in rows if row.response_id is not None]
    agents = {row.agent for row in rows}
    feedback = c.execute(
        sa.delete(schema.feedback).where(schema.feedback.c.target.in_(targets), schema.feedback.c.agent.in_(agents))
    ).rowcount
    rewards = c.execute(sa.delete(schema.rewards).where(schema.rewards.c.trace_id.in_(ids))).rowcount
    c.execute(sa.delete(t).where(t.c.seq.in_([row.seq for row in rows])))
    report = DeletionReport(
        traces=len(rows),
        bytes=sum(row.size for row in rows),
        rewards=rewards,
        feedback=feedback,
        recalls=recalled,
        sent=tuple((row.agent, row.id) for row in sent),
    )
    report += _delete_emptied(c, sorted({row.session for row in rows}), now)
    freed = {(STORED_BYTES, agent): -sum(row.size for row in rows if row.agent == agent) for agent in agents}
    count_all(c, freed)
    return report


def delete_all(engine: Engine, where: TraceFilter) -> DeletionReport:
    """Delete all traces that ``where`` holds for, batch by batch, and what an agent or session leaves behind."""
    total = DeletionReport()
    while True:
        with engine.begin() as c:
            part = delete_traces(c, where)
        if not part.traces:
            break
        total += part
    if where.since is None and where.until is None and where.id is None and where.after_seq is None:
        total += _delete_leftovers(engine, where)
    if engine.dialect.name == "sqlite":
        scrub(engine)
    return total


def delete_empty_sessions(c: Connection, before: float, limit: int = _BATCH) -> DeletionReport:
    """Delete closed sessions without a trace whose last request was before ``before`` (Unix seconds)."""
    s, t = schema.sessions.c, schema.traces.c
    empty = ~sa.exists().where(t.session == s.id)
    query = sa.select(s.id).where(s.closed_at.is_not(None), s.last_at < before, empty).limit(limit)
    return _delete_sessions(c, c.execute(query).scalars().all())


def scrub(engine: Engine) -> None:
    """Empty SQLite's write-ahead log into the database, so that deleted text is not left behind in it.

    Deleted content inside the database is overwritten with zeros already (``secure_delete``). Other connections may
    keep the log from being emptied just now; SQLite does it then at the next checkpoint.
    """
    with engine.connect() as c:
        raw = c.connection.dbapi_connection
        if raw is not None:
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def open_recalls(c: Connection, limit: int = 1000) -> list[str]:
    """Ids of deleted traces that the trainer has yet to forget, oldest first."""
    r = schema.recalls.c
    query = sa.select(r.trace_id).where(r.settled_at.is_(None)).order_by(r.at).limit(limit)
    return [str(trace) for trace in c.execute(query).scalars()]


def settle_recalls(c: Connection, trace_ids: Sequence[str], reply: RecallReply) -> None:
    """Note the trainer's answer: samples that it dropped are never trained; versions may have learned already."""
    r = schema.recalls
    c.execute(sa.update(r).where(r.c.trace_id.in_(trace_ids)).values(settled_at=time.time()))
    for sample in reply.removed:
        mark_skipped(c, sample, "a trace of its sample was deleted")
    for version in reply.trained_into:
        count(c, TRAINED_AND_DELETED, version)


def _delete_emptied(c: Connection, sessions: Sequence[str], now: float) -> DeletionReport:
    s, t = schema.sessions.c, schema.traces.c
    kept = sa.select(t.session).where(t.session.in_(sessions))
    empty = c.execute(sa.select(s.id, s.last_at).where(s.id.in_(sessions), s.id.not_in(kept))).all()
    quiet = [row.id for row in empty if row.last_at < now - _QUIET]
    busy = [row.id for row in empty if row.last_at >= now - _QUIET]
    # A request may still be under way in these; their rows go later, their content goes now.
    closed = sa.update(schema.sessions).where(s.id.in_(busy), s.closed_at.is_(None))
    c.execute(closed.values(closed_at=now, close_reason="deleted"))
    return _delete_content(c, busy) + _delete_sessions(c, quiet)


def _delete_sessions(c: Connection, sessions: Sequence[str]) -> DeletionReport:
    report = _delete_content(c, sessions)
    deleted = c.execute(sa.delete(schema.sessions).where(schema.sessions.c.id.in_(sessions))).rowcount
    return report + DeletionReport(sessions=deleted)


def _delete_content(c: Connection, sessions: Sequence[str]) -> DeletionReport:
    if not sessions:
        return DeletionReport()
    for table in (schema.skill_exposures, schema.skill_support):
        c.execute(sa.delete(table).where(table.c.session.in_(sessions)))
    return DeletionReport(
        chain=c.execute(sa.delete(schema.chain).where(schema.chain.c.session.in_(sessions))).rowcount,
        injections=c.execute(sa.delete(schema.injections).where(schema.injections.c.session.in_(sessions))).rowcount,
    )


def _delete_leftovers(engine: Engine, where: TraceFilter) -> DeletionReport:
    s, f = schema.sessions.c, schema.feedback.c
    total = DeletionReport()
    mine = [column == value for column, value in ((s.agent, where.agent), (s.id, where.session)) if value is not None]
    empty = ~sa.exists().where(schema.traces.c.session == s.id)
    while True:
        with engine.begin() as c:
            quiet = s.last_at < time.time() - _QUIET
            found = c.execute(sa.select(s.id).where(*mine, empty, quiet).limit(_BATCH)).scalars().all()
            total += _delete_sessions(c, found)
        if not found:
            break
    if where.session is None:
        with engine.begin() as c:
            mine = [f.agent == where.agent] if where.agent is not None else []
            total += DeletionReport(feedback=c.execute(sa.delete(schema.feedback).where(*mine)).rowcount)
    return total
