"""How many bytes traces may take, in all: ``metaclaw.store.max_bytes``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from metaclaw_plugin.store.traces import InsertReport, add_traces, stored_bytes


class Quota:
    """Stores what there is room for. Used in the thread of one ``GroupCommit`` alone."""

    def __init__(self, max_bytes: int | None) -> None:
        """``max_bytes``: ``None`` is no limit."""
        self._max_bytes = max_bytes
        self._transaction: object = None  # in which ...
        self._uncounted = 0  # ... so many bytes were stored: counters are written last
        self._refused_at: int | None = None  # bytes that were stored when a trace did not fit

    def insert(self, c: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> InsertReport:
        """Store those of ``rows`` that fit. The report's ``counts`` are the caller's to write."""
        if self._max_bytes is None:
            return add_traces(c, rows, None)
        stored = self._stored(c)
        report = add_traces(c, rows, self._max_bytes - stored)
        self._uncounted += report.bytes
        if report.over_quota:
            self._refused_at = stored + report.bytes
        return report

    def is_full(self, c: sa.Connection) -> bool:
        """Whether nothing more is kept: from the first trace that did not fit until something is deleted."""
        if self._max_bytes is None:
            return False
        stored = self._stored(c)
        if self._refused_at is not None and stored < self._refused_at:
            self._refused_at = None
        return self._refused_at is not None or stored >= self._max_bytes

    def _stored(self, c: sa.Connection) -> int:
        if (transaction := c.get_transaction()) is not self._transaction:
            self._transaction, self._uncounted = transaction, 0
        return stored_bytes(c) + self._uncounted
