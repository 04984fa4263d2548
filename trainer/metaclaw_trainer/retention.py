"""Disk for adapter versions stays within its budget: the oldest that nobody needs go first.

Needed are what vLLM shall hold, the head of each agent (the next step starts there) and each agent's newest few (the
worker may not have judged them yet). If those alone are more than the budget, they stay, and the log says so.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.names import version_name

from metaclaw_trainer.checkpoints import remove_checkpoint
from metaclaw_trainer.errors import TrainerError
from metaclaw_trainer.schema import agents, proofs, served, versions
from metaclaw_trainer.store import Store

log = logging.getLogger(__name__)

KEPT_NEWEST = 3  # of each agent


class Retention:
    """Keeps the folders of versions below ``folder`` within ``budget`` bytes."""

    def __init__(self, store: Store, folder: Path, budget: int) -> None:
        self._store = store
        self._folder = folder.resolve()
        self._budget = budget
        self._over = False

    def sweep(self) -> list[str]:
        """Remove what has to go; the names of those versions."""
        self._finish_removals()
        with self._store.read() as c:
            used = int(c.scalar(sa.select(sa.func.sum(versions.c.size)).where(versions.c.removed_at.is_(None))) or 0)
            candidates = self._candidates(c) if used > self._budget else []
        gone = []
        for row in candidates:
            if used <= self._budget:
                break
            if self._mark(row.agent, row.number):
                self._remove(row.path)
                used -= row.size
                gone.append(version_name(row.agent, row.number))
        if gone:
            log.info("removed %d old versions to stay within the disk budget, such as %s", len(gone), gone[0])
        if (used > self._budget) != self._over:
            self._over = not self._over
            if self._over:
                log.warning(
                    "adapter versions take %d MiB, the budget is %d MiB, and all of them are needed: raise "
                    "metaclaw.trainer.disk_budget_gib",
                    used >> 20,
                    self._budget >> 20,
                )
        return gone

    def _candidates(self, c: sa.Connection) -> list[Any]:
        """Versions that may go, oldest first."""
        rank = sa.func.row_number().over(partition_by=versions.c.agent, order_by=versions.c.number.desc())
        ranked = sa.select(
            versions.c.agent, versions.c.number, versions.c.path, versions.c.size, versions.c.cursor, rank.label("rank")
        ).where(versions.c.removed_at.is_(None))
        table = ranked.subquery()
        heads = sa.exists().where(agents.c.name == table.c.agent, agents.c.head == table.c.number)
        query = (
            sa.select(table.c.agent, table.c.number, table.c.path, table.c.size)
            .where(table.c.rank > KEPT_NEWEST, ~heads)
            .order_by(table.c.cursor)
        )
        wanted = set(c.scalars(sa.select(served.c.name)))
        return [row for row in c.execute(query) if version_name(row.agent, row.number) not in wanted]

    def _mark(self, agent: str, number: int) -> bool:
        """Say that the files are gone before they are, unless somebody has come to need them."""
        mine = sa.and_(versions.c.agent == agent, versions.c.number == number)
        with self._store.write() as c:
            # The lock on the row makes whoever wants to serve it wait; what is read after it is what counts.
            c.execute(sa.select(versions.c.number).where(mine).with_for_update())
            wanted = c.scalar(sa.select(served.c.name).where(served.c.name == version_name(agent, number)))
            head = c.scalar(sa.select(agents.c.head).where(agents.c.name == agent).with_for_update())
            if wanted is not None or head == number:
                return False
            c.execute(versions.update().where(mine).values(removed_at=time.time()))
            c.execute(proofs.delete().where(proofs.c.agent == agent, proofs.c.number == number))
        return True

    def _finish_removals(self) -> None:
        """Remove what was marked by a process that was killed before it removed it."""
        query = sa.select(versions.c.path).where(versions.c.removed_at > time.time() - 86_400)
        with self._store.read() as c:
            paths = list(c.scalars(query))
        for path in paths:
            self._remove(path)

    def _remove(self, path: str) -> None:
        folder = Path(path)
        if not folder.resolve().is_relative_to(self._folder) or not folder.is_dir():
            return
        try:
            remove_checkpoint(folder)
        except OSError as error:
            raise TrainerError(f"cannot remove the old version at {folder}: {error.strerror}") from error
