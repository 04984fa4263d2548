"""Whoever decides about an agent's versions does so alone.

What is read in a transaction, such as that a version is a candidate still, must hold when it writes. On SQLite
``engine.begin()`` sees to that; on PostgreSQL rows are locked, always in the same order, so that no two wait for each
other: the agent's route, then its serving versions by ascending number, as ``pick_route`` locks them for requests.
"""

from __future__ import annotations

import sqlalchemy as sa
from metaclaw_hooks.types import BASE_VERSION, VersionState

from metaclaw_plugin.store.engine import insert_or_ignore
from metaclaw_plugin.store.schema import adapters, routes


def lock_agent(c: sa.Connection, agent: str) -> None:
    """Nobody else decides about the agent until this transaction, of ``engine.begin()``, ends; call it first in it.

    A transaction locks one agent at most.
    """
    insert_or_ignore(c, routes, [{"agent": agent, "version": BASE_VERSION, "changed_at": 0.0}])
    c.execute(sa.select(routes.c.agent).where(routes.c.agent == agent).with_for_update())
    serving = (adapters.c.agent == agent) & (adapters.c.state == VersionState.SERVING.value)
    c.execute(sa.select(adapters.c.number).where(serving).order_by(adapters.c.number).with_for_update()).all()
