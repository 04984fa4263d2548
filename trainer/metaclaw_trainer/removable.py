"""Which folders may be removed to save space, and the mark that says so before their files go.

Of adapter versions: all but what vLLM shall hold, what the worker may go back to, the head of each agent (the next step
starts there) and each agent's newest few (the worker may not have judged them yet). Of training sessions: all
checkpoints but the newest of each session that was at work lately; and the weights of sessions that have ended,
whatever space there is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from metaclaw_hooks.names import parse_version, version_name

from metaclaw_trainer.schema import agents, issued_paths, kept, proofs, run_weights, served, versions
from metaclaw_trainer.store import Store

KEPT_NEWEST = 3  # versions of each agent
SETTLED_SECONDS = 600.0  # a folder that is younger may belong to a session that has not said so yet
_FINISH_WITHIN = 86_400.0  # seconds after a mark in which files that are still there are looked for


@dataclass(frozen=True, slots=True)
class Removable:
    """A folder that nobody needs."""

    name: str  # for the log, and for ``mark``
    path: str
    size: int  # bytes
    made_at: float  # Unix seconds


class Source(Protocol):
    """One kind of folders."""

    def used(self, c: sa.Connection) -> int:
        """Bytes of all that are there."""
        ...

    def candidates(self, c: sa.Connection) -> list[Removable]:
        """Those that may go."""
        ...

    def mark(self, one: Removable) -> bool:
        """Say in the store that its files are gone; False if somebody has come to need them."""
        ...

    def marked(self, c: sa.Connection) -> list[str]:
        """Paths that were marked lately: whoever did may have been killed before the files were gone."""
        ...


class VersionFiles:
    """Adapter versions."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def used(self, c: sa.Connection) -> int:
        return int(c.scalar(sa.select(sa.func.sum(versions.c.size)).where(versions.c.removed_at.is_(None))) or 0)

    def candidates(self, c: sa.Connection) -> list[Removable]:
        rank = sa.func.row_number().over(partition_by=versions.c.agent, order_by=versions.c.number.desc())
        ranked = sa.select(versions, rank.label("rank")).where(versions.c.removed_at.is_(None)).subquery()
        heads = sa.exists().where(agents.c.name == ranked.c.agent, agents.c.head == ranked.c.number)
        query = sa.select(ranked).where(ranked.c.rank > KEPT_NEWEST, ~heads).order_by(ranked.c.cursor)
        wanted = set(c.scalars(sa.union(sa.select(served.c.name), sa.select(kept.c.name))))
        named = [(version_name(row.agent, row.number), row) for row in c.execute(query)]
        return [Removable(name, row.path, row.size, row.created_at) for name, row in named if name not in wanted]

    def mark(self, one: Removable) -> bool:
        agent, number = parse_version(one.name)
        mine = sa.and_(versions.c.agent == agent, versions.c.number == number)
        with self._store.write() as c:
            # The lock on the row makes whoever wants to serve it wait; what is read after it is what counts.
            c.execute(sa.select(versions.c.number).where(mine).with_for_update())
            named = [sa.select(table.c.name).where(table.c.name == one.name) for table in (served, kept)]
            wanted = c.scalar(sa.union(*named))
            head = c.scalar(sa.select(agents.c.head).where(agents.c.name == agent).with_for_update())
            if wanted is not None or head == number:
                return False
            c.execute(versions.update().where(mine).values(removed_at=time.time()))
            c.execute(proofs.delete().where(proofs.c.agent == agent, proofs.c.number == number))
        return True

    def marked(self, c: sa.Connection) -> list[str]:
        return list(c.scalars(sa.select(versions.c.path).where(versions.c.removed_at > time.time() - _FINISH_WITHIN)))


class SessionFiles:
    """Checkpoints and weights of the fork's wire. ``idle_seconds``: a session at rest for longer is not at work."""

    def __init__(self, store: Store, idle_seconds: float) -> None:
        self._store = store
        self._idle_seconds = idle_seconds

    def used(self, c: sa.Connection) -> int:
        there = issued_paths.c.removed_at.is_(None)
        return int(c.scalar(sa.select(sa.func.sum(issued_paths.c.size)).where(there)) or 0)

    def candidates(self, c: sa.Connection) -> list[Removable]:
        rank = sa.func.row_number().over(
            partition_by=issued_paths.c.session_id, order_by=(issued_paths.c.at.desc(), issued_paths.c.path)
        )
        there = sa.and_(issued_paths.c.kind == "checkpoints", issued_paths.c.removed_at.is_(None))
        ranked = sa.select(issued_paths, rank.label("rank")).where(there).subquery()
        idle = ranked.c.at < time.time() - self._idle_seconds
        query = sa.select(ranked).where(sa.or_(ranked.c.rank > 1, idle)).order_by(ranked.c.at)
        return [_of(row) for row in c.execute(query)]

    def ended(self, c: sa.Connection) -> list[Removable]:
        """Weights of sessions that have ended without being closed: their process was killed."""
        settled = issued_paths.c.at < time.time() - SETTLED_SECONDS
        open_ = sa.exists().where(run_weights.c.session_id == issued_paths.c.session_id)
        here = sa.and_(issued_paths.c.kind == "weights", issued_paths.c.removed_at.is_(None))
        return [_of(row) for row in c.execute(sa.select(issued_paths).where(here, settled, ~open_))]

    def mark(self, one: Removable) -> bool:
        with self._store.write() as c:
            c.execute(issued_paths.update().where(issued_paths.c.path == one.path).values(removed_at=time.time()))
        return True

    def marked(self, c: sa.Connection) -> list[str]:
        recent = issued_paths.c.removed_at > time.time() - _FINISH_WITHIN
        return list(c.scalars(sa.select(issued_paths.c.path).where(recent)))


def _of(row: sa.Row[tuple[object, ...]]) -> Removable:
    path = Path(row.path)
    return Removable(f"session {row.session_id[:8]} {path.name}", row.path, row.size, row.at)
