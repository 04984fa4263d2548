"""Traces that are too old, or too many, are deleted; complete, as every deletion.

``due`` looks, without a lock; ``retain`` deletes. Both look at the oldest stored traces alone, so that they cost the
same whatever the store holds.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from metaclaw_plugin.settings import StoreSettings
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.store.deletion import BY_RETENTION, DeletionReport, delete_empty_sessions, delete_traces
from metaclaw_plugin.store.traces import TraceFilter, stored_bytes

EXPIRED = "traces_expired"  # counter: traces deleted for their age ("age") or for room ("bytes")
DAY = 86_400.0  # seconds
_BATCH = 100  # traces to a transaction
_EMPTY_FOR = 7 * DAY  # how long a closed session without a trace is kept


def due(c: Connection, settings: StoreSettings, now: float) -> bool:
    """Whether ``retain`` would delete traces; reads only."""
    if settings.keep_bytes is not None and stored_bytes(c) > settings.keep_bytes:
        return True
    return settings.keep_days is not None and any(at < now - settings.keep_days * DAY for _, at, _ in _oldest(c))


def retain(c: Connection, settings: StoreSettings, now: float) -> DeletionReport:
    """Delete a bounded number of traces that need not be kept; call again until the report says none."""
    report = DeletionReport()
    oldest = _oldest(c)
    if settings.keep_days is not None and oldest:
        old = TraceFilter(until=now - settings.keep_days * DAY, up_to_seq=oldest[-1][0])
        report += _counted(c, "age", delete_traces(c, old, _BATCH, cause=BY_RETENTION))
    if settings.keep_bytes is not None and (excess := stored_bytes(c) - settings.keep_bytes) > 0:
        report += _counted(c, "bytes", delete_traces(c, TraceFilter(), _enough(c, excess), cause=BY_RETENTION))
    return report


def sweep_sessions(c: Connection, now: float) -> DeletionReport:
    """Delete a bounded number of sessions that were closed long ago and hold no trace."""
    return delete_empty_sessions(c, now - _EMPTY_FOR)


def _oldest(c: Connection) -> list[tuple[int, float, int]]:
    """``seq``, ``finished_at`` and size of the traces that were stored first."""
    t = schema.traces.c
    rows = c.execute(sa.select(t.seq, t.finished_at, t.size).order_by(t.seq).limit(_BATCH))
    return [(row.seq, row.finished_at, row.size) for row in rows]


def _enough(c: Connection, excess: int) -> int:
    """How many of the oldest traces hold ``excess`` bytes, up to a batch of them."""
    freed = 0
    for place, (_, _, size) in enumerate(_oldest(c), start=1):
        freed += size
        if freed >= excess:
            return place
    return _BATCH


def _counted(c: Connection, label: str, report: DeletionReport) -> DeletionReport:
    if report.traces:
        count(c, EXPIRED, label, report.traces)
    return report
