"""Traces that are too old, or too many, are deleted; complete, as every deletion."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from metaclaw_plugin.settings import StoreSettings
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.store.deletion import DeletionReport, delete_empty_sessions, delete_traces
from metaclaw_plugin.store.traces import TraceFilter, stored_bytes

EXPIRED = "traces_expired"  # counter: traces deleted for their age ("age") or for room ("bytes")
DAY = 86_400.0  # seconds
_BATCH = 100  # traces to a transaction
_EMPTY_FOR = 7 * DAY  # how long a closed session without a trace is kept


def retain(c: Connection, settings: StoreSettings, now: float) -> DeletionReport:
    """Delete a bounded number of what need not be kept; call again until the report says nothing was deleted."""
    report = delete_empty_sessions(c, now - _EMPTY_FOR)
    if settings.keep_days is not None:
        old = delete_traces(c, TraceFilter(until=now - settings.keep_days * DAY), _BATCH)
        report += _counted(c, "age", old)
    if settings.keep_bytes is not None and (excess := stored_bytes(c) - settings.keep_bytes) > 0:
        report += _counted(c, "bytes", delete_traces(c, TraceFilter(), _enough(c, excess)))
    return report


def _enough(c: Connection, excess: int) -> int:
    """How many of the oldest traces hold ``excess`` bytes, up to a batch of them."""
    t = schema.traces.c
    freed = 0
    for place, size in enumerate(c.execute(sa.select(t.size).order_by(t.seq).limit(_BATCH)).scalars(), start=1):
        freed += size
        if freed >= excess:
            return place
    return _BATCH


def _counted(c: Connection, label: str, report: DeletionReport) -> DeletionReport:
    if report.traces:
        count(c, EXPIRED, label, report.traces)
    return report
