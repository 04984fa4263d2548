"""Disk for adapters stays within its budget, the oldest that nobody needs going first; and old rows are forgotten.

What is needed (see ``removable``) stays even if it alone is more than the budget; the log says so then.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from pathlib import Path

import sqlalchemy as sa

from metaclaw_trainer.checkpoints import remove_checkpoint
from metaclaw_trainer.errors import TrainerError
from metaclaw_trainer.removable import Removable, SessionFiles, Source, VersionFiles
from metaclaw_trainer.schema import issued_paths, recalled_traces, sample_traces, samples
from metaclaw_trainer.store import Store

log = logging.getLogger(__name__)

LEFT_SECONDS = 3600.0  # age of a half-written folder of a session after which its writer is dead
_ROWS = 500  # removed in one transaction


class Retention:
    """Keeps the folders of versions and sessions below ``folder`` within ``budget`` bytes.

    Args:
        idle_seconds: a training session at rest for longer may lose its newest checkpoint too.
    """

    def __init__(self, store: Store, folder: Path, budget: int, idle_seconds: float = 86_400.0) -> None:
        self._store = store
        self._folder = folder.resolve()
        self._budget = budget
        self._sessions = SessionFiles(store, idle_seconds)
        self._sources: tuple[Source, ...] = (VersionFiles(store), self._sessions)
        self._over = False

    def sweep(self) -> list[str]:
        """Remove what has to go; the names of it, oldest first."""
        self._finish()
        with self._store.read() as c:
            used = sum(source.used(c) for source in self._sources)
            named = [(one, source) for source in self._sources for one in source.candidates(c)]
        gone = []
        for one, source in sorted(named, key=lambda pair: pair[0].made_at):
            if used <= self._budget:
                break
            if self._removed(one, source):
                used -= one.size
                gone.append(one.name)
        if gone:
            log.info("removed %d old adapters to stay within the disk budget, such as %s", len(gone), gone[0])
        if (used > self._budget) != self._over:
            self._over = not self._over
            if self._over:
                log.warning(
                    "adapters take %d MiB, the budget is %d MiB, and all of them are needed: raise "
                    "metaclaw.trainer.disk_budget_gib",
                    used >> 20,
                    self._budget >> 20,
                )
        return gone

    def _finish(self) -> None:
        """Remove what processes that were killed have left: folders marked as removed, half-written, or of nobody."""
        with self._store.read() as c:
            paths = [path for source in self._sources for path in source.marked(c)]
            ended = self._sessions.ended(c)
        for path in paths:
            self._remove(path)
        for one in ended:
            self._removed(one, self._sessions)
        for left in (self._folder / "runs").glob("*/*/.*.*"):
            with contextlib.suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - LEFT_SECONDS:
                    shutil.rmtree(left)

    def _removed(self, one: Removable, source: Source) -> bool:
        if not source.mark(one):
            return False
        self._remove(one.path)
        return True

    def _remove(self, path: str) -> None:
        folder = Path(path)
        if not folder.resolve().is_relative_to(self._folder) or not folder.is_dir():
            return
        try:
            remove_checkpoint(folder)
        except OSError as error:
            raise TrainerError(f"cannot remove the old adapter at {folder}: {error.strerror}") from error


class Forgetting:
    """Removes rows of samples that were settled, and of traces that were recalled, ``days`` ago.

    They are kept that long so that a sample that is sent again is known. Which versions learned from a trace stays in
    the manifests of the versions.
    """

    def __init__(self, store: Store, days: float) -> None:
        self._store = store
        self._seconds = days * 86_400.0

    def sweep(self) -> int:
        """How many samples were forgotten."""
        before, total = time.time() - self._seconds, 0
        while True:
            with self._store.write() as c:
                query = sa.select(samples.c.id).where(samples.c.settled_at < before).limit(_ROWS)
                ids = list(c.scalars(query))
                c.execute(sample_traces.delete().where(sample_traces.c.sample_id.in_(ids)))
                c.execute(samples.delete().where(samples.c.id.in_(ids)))
            total += len(ids)
            if len(ids) < _ROWS:
                break
        with self._store.write() as c:
            c.execute(recalled_traces.delete().where(recalled_traces.c.at < before))
            c.execute(issued_paths.delete().where(issued_paths.c.removed_at < before))
        if total:
            log.info("forgot %d samples that were settled %d days ago", total, round(self._seconds / 86_400))
        return total
