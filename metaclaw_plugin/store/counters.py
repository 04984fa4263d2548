"""Things counted across processes: lost traces, failed hooks, refused samples."""

from __future__ import annotations

import time
from collections.abc import Mapping
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


def count_all(c: Connection, counts: Mapping[tuple[str, str], int]) -> None:
    """Add to several counters, by name and label: each once and in one order, or two writers would wait for each other.

    Every request of an agent changes the same few rows, and their locks last until the commit: call it last.
    """
    for (name, label), n in sorted(counts.items()):
        count(c, name, label, n)


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
