"""When a request came last: of each agent, and of anyone, whether or not anything of it was kept."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from metaclaw_plugin.store.engine import dialect_insert
from metaclaw_plugin.store.schema import last_requests

CLOCKS_DIFFER = 60.0  # seconds: what is later by more was written before a clock was set back
ANYONE = ""  # no agent is named so: the row of all requests, those without an agent included


def note_requests(c: sa.Connection, seen: Mapping[str, float]) -> None:
    """Agent, or ``ANYONE``, -> Unix seconds of its newest request; what another process saw later stands."""
    statement = dialect_insert(c, last_requests)
    kept, given = last_requests.c.at, statement.excluded.at
    newer = statement.on_conflict_do_update(
        index_elements=["agent"],
        set_={"at": given},
        where=sa.or_(kept < given, kept > given + CLOCKS_DIFFER),
    )
    for agent, at in sorted(seen.items()):  # in one order, so that two processes never wait for each other
        c.execute(newer, {"agent": agent, "at": at})


def read_last_requests(c: sa.Connection) -> dict[str, float]:
    """Agent, or ``ANYONE``, -> Unix seconds of its newest request; one that never was asked is left out."""
    return {row.agent: row.at for row in c.execute(sa.select(last_requests))}
