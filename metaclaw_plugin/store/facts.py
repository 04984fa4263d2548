"""Small shared facts, such as how far the trainer's list of versions was read."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.engine import put
from metaclaw_plugin.store.schema import facts


def get_fact(c: Connection, name: str, default: Any = None) -> Any:
    """The JSON value of the fact ``name``, or ``default`` if it was never set."""
    row = c.execute(sa.select(facts.c.value).where(facts.c.name == name)).one_or_none()
    return default if row is None else row.value


def set_fact(c: Connection, name: str, value: Any) -> None:
    """Set the fact ``name`` to ``value``, which must be JSON."""
    put(c, facts, {"name": name, "value": value, "at": time.time()}, ("value", "at"))
