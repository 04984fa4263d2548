"""Which trainer processes live, so that what a dead one held is given back, and nothing else is.

A process holds a lock on a file of its own as long as it lives; on the same machine that tells at once whether it died
(``kill -9`` included). Of processes on other machines the heartbeat in the store tells it, after ``lease_seconds``.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import time
import uuid
from pathlib import Path
from typing import IO

import sqlalchemy as sa

from metaclaw_trainer.schema import agents, owners, run_weights, samples
from metaclaw_trainer.store import Store

log = logging.getLogger(__name__)


class Owner:
    """This process, as the holder of claims.

    Args:
        folder: where lock files lie; shared by the trainers of one machine.
        lease_seconds: age of a heartbeat after which a process of another machine counts as dead.
    """

    def __init__(self, store: Store, folder: Path, lease_seconds: float) -> None:
        self.id = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._store = store
        self._folder = folder
        self._lease_seconds = lease_seconds
        self._host = socket.gethostname()[:200]
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock: IO[bytes] = self._path(self.id).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with store.write() as c:
            c.execute(owners.insert().values(id=self.id, host=self._host, seen_at=time.time()))
        self.reap()

    def _path(self, owner: str) -> Path:
        return self._folder / f"{owner}.lock"

    def heartbeat(self) -> None:
        """Say that this process lives, and give back what dead ones held."""
        with self._store.write() as c:
            seen = c.execute(owners.update().where(owners.c.id == self.id).values(seen_at=time.time()))
            if seen.rowcount == 0:  # declared dead by another machine while this one slept
                c.execute(owners.insert().values(id=self.id, host=self._host, seen_at=time.time()))
        self.reap()

    def reap(self) -> list[str]:
        """Give back what dead processes held; their ids."""
        with self._store.read() as c:
            rows = c.execute(sa.select(owners).where(owners.c.id != self.id)).all()
        dead = [row.id for row in rows if self._is_dead(row.id, row.host, row.seen_at)]
        for owner in dead:
            with self._store.write() as c:
                freed = give_back(c, owner)
                c.execute(owners.delete().where(owners.c.id == owner))
            with contextlib.suppress(FileNotFoundError):
                self._path(owner).unlink()
            log.info("trainer process %s has ended; %d samples that it held wait again", owner, freed)
        return dead

    def _is_dead(self, owner: str, host: str, seen_at: float) -> bool:
        if host == self._host and self._path(owner).exists():
            with self._path(owner).open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return False
                return True
        return time.time() - seen_at > self._lease_seconds

    def close(self) -> None:
        """Give back what this process holds."""
        with self._store.write() as c:
            give_back(c, self.id)
            c.execute(owners.delete().where(owners.c.id == self.id))
        self._lock.close()
        self._path(self.id).unlink(missing_ok=True)


def give_back(c: sa.Connection, owner: str) -> int:
    """Samples claimed by ``owner`` wait again, its agents are free, its sessions are over; how many samples."""
    freed = c.execute(
        samples.update()
        .where(samples.c.owner == owner, samples.c.state == "claimed")
        .values(state="waiting", owner=None)
    )
    c.execute(agents.update().where(agents.c.owner == owner).values(owner=None))
    c.execute(run_weights.delete().where(run_weights.c.owner == owner))
    return freed.rowcount
