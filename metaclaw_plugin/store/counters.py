"""Things counted across processes: lost traces, failed hooks, refused samples."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.schema import counters

LABEL_LENGTH = 200


def count(c: Connection, name: str, label: str = "", n: int = 1) -> None:
    """Add ``n`` (negative: take away) to the counter ``name`` for ``label``: an agent, a plugin or a reason.

    Labels are cut to 200 characters.
    """
    statement = _adding(c.dialect.name)
    c.execute(statement, {"name": name, "label": label[:LABEL_LENGTH], "value": n, "at": time.time()})


def read_counters(c: Connection, name: str | None = None) -> dict[str, dict[str, int]]:
    """Counter name -> label -> value; only ``name`` if given."""
    query = sa.select(counters.c.name, counters.c.label, counters.c.value).order_by(counters.c.name, counters.c.label)
    if name is not None:
        query = query.where(counters.c.name == name)
    found: dict[str, dict[str, int]] = {}
    for row in c.execute(query):
        found.setdefault(row.name, {})[row.label] = row.value
    return found


@cache
def _adding(dialect: str) -> Any:
    insert = postgresql.insert(counters) if dialect == "postgresql" else sqlite.insert(counters)
    sums = {"value": counters.c.value + insert.excluded.value, "at": insert.excluded.at}
    return insert.on_conflict_do_update(index_elements=[counters.c.name, counters.c.label], set_=sums)
