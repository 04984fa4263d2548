"""What keeps a version loaded after it left the route, and when nothing does any more.

``gateway/routing.py`` describes the protocol, and writes the rows that are read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa
from metaclaw_hooks.types import VersionState

from metaclaw_plugin.store.adapters import WISH_WITHDRAW, find_row, get_route, update_version
from metaclaw_plugin.store.deciding import lock_agent
from metaclaw_plugin.store.schema import in_flight, sessions


def retire_if_drained(c: sa.Connection, agent: str, number: int, *, dead: Sequence[str], open_since: float) -> bool:
    """Retire a draining version (reject it, if its owner withdrew it) if nothing can need it; whether it was done.

    Nothing needs it when no process, but those that are ``dead``, has a request on it, and no exchange that was active
    after ``open_since`` is pinned to it. Its row is locked, as ``pick_route`` locks it, so no request begins meanwhile
    (``c`` must be of ``engine.begin()``).
    """
    lock_agent(c, agent)
    row = find_row(c, agent, number, lock=True)
    route = get_route(c, agent)
    if row is None or row.state != VersionState.SERVING.value or number in (route.version, route.canary):
        return False
    alive = in_flight.c.process.not_in(dead)
    mine = sa.and_(in_flight.c.agent == agent, in_flight.c.version == number, alive)
    busy = c.scalar(sa.select(sa.func.count()).select_from(in_flight).where(mine))
    pinned = c.scalar(
        sa.select(sa.func.count())
        .select_from(sessions)
        .where(
            sessions.c.agent == agent,
            sessions.c.adapter_version == number,
            sessions.c.closed_at.is_(None),
            sessions.c.last_at > open_since,
        )
    )
    if busy or pinned:
        return False
    end = VersionState.REJECTED if row.wish == WISH_WITHDRAW else VersionState.RETIRED
    update_version(c, agent, number, state=end.value, wish=None, problem=None)
    return True


def heartbeats(c: sa.Connection) -> dict[str, float]:
    """The newest stamp of each gateway process that has a request in flight."""
    newest = sa.func.max(in_flight.c.at).label("stamp")
    return {row.process: row.stamp for row in c.execute(sa.select(in_flight.c.process, newest).group_by("process"))}


def forget_processes(c: sa.Connection, stamps: Mapping[str, float]) -> None:
    """Remove the rows of dead processes, if their stamps are still these."""
    for process, stamp in stamps.items():
        c.execute(in_flight.delete().where(in_flight.c.process == process, in_flight.c.at <= stamp))
