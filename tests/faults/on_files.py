"""Faults of what lies on disk: no room, databases locked or away, checkpoints and adapters away."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.disk import Disk
from tests.faults.fault_list import fault
from tests.faults.on_processes import unload_all
from tests.faults.siege import Siege
from tests.faults.stage import Stage


@fault("the adapters' files away, and vllm forgets them", kills=False)
async def adapters_away(siege: Siege) -> int:
    with _moved(siege.stage.trainer_home / "adapters") as moved:
        forgotten = await unload_all(siege)
        await asyncio.sleep(4.0)
    return min(moved, forgotten)


@fault("the checkpoints away for 6 s", kills=False)
async def checkpoints_away(siege: Siege) -> int:
    with _moved(siege.stage.trainer_home / "adapters") as moved:
        await siege.killer.kill("trainer", signal.SIGKILL)
        await asyncio.sleep(6.0)
    return moved


@contextmanager
def _moved(path: Path) -> Iterator[int]:
    """The folder ``path`` is elsewhere while the block runs; what was made in its place meanwhile is kept.

    Yields how many versions were in it.
    """
    away = path.with_name(f".{path.name}.away")
    path.mkdir(parents=True, exist_ok=True)
    path.rename(away)
    try:
        yield len(list(away.glob("*/v*")))
    finally:
        for made in path.glob("*/v*"):  # a version that was listed meanwhile
            (away / made.parent.name).mkdir(exist_ok=True)
            made.rename(away / made.parent.name / made.name)
        shutil.rmtree(path, ignore_errors=True)
        away.rename(path)


@contextmanager
def _full(disk: Disk, pids: list[int]) -> Iterator[int]:
    """No room on ``disk``, or for ``pids`` to write in, while the block runs; yields 1 if there is none indeed."""
    disk.fill(pids)
    try:
        yield int(disk.is_full)
    finally:
        disk.free()


def _store_disk_full(stage: Stage) -> contextlib.AbstractContextManager[int]:
    return _full(stage.store_disk, [*stage.gateway_workers(), stage.pid("worker")])


@fault("disk of the store full", "records")
async def store_disk_full(siege: Siege) -> int:
    with _store_disk_full(siege.stage) as full:
        await asyncio.sleep(6.0)
    return full


@fault("disk of the trainer full")
async def trainer_disk_full(siege: Siege) -> int:
    with _full(siege.stage.trainer_disk, [siege.stage.pid("trainer")]) as full:
        await asyncio.sleep(6.0)
    return full


@fault("disk of the store full, and the worker killed", "records")
async def store_disk_full_and_kill(siege: Siege) -> int:
    with _store_disk_full(siege.stage) as full:
        await asyncio.sleep(1.0)
        await siege.killer.kill("worker", signal.SIGKILL)
        await asyncio.sleep(4.0)
    return full


async def _locked(stage: Stage, file: Path, seconds: float) -> int:
    """Hold the write lock of ``file``; 1 if nobody else could take it at the end."""
    with stage.locked(file):
        await asyncio.sleep(seconds)
        return int(stage.is_locked(file))


@fault("store locked for 1 s")
async def store_locked_briefly(siege: Siege) -> int:
    return await _locked(siege.stage, siege.stage.store_file, 1.0)


@fault("store locked for 8 s", "records")
async def store_locked(siege: Siege) -> int:
    return await _locked(siege.stage, siege.stage.store_file, 8.0)


@fault("store locked for 8 s, and a gateway worker killed", "records", kills=False)
async def store_locked_and_kill(siege: Siege) -> int:
    """It takes along the answers that it has counted as late."""
    with siege.stage.locked(siege.stage.store_file):
        await asyncio.sleep(4.0)
        await siege.killer.kill("gateway-worker", signal.SIGKILL)
        await asyncio.sleep(4.0)
        return int(siege.stage.is_locked(siege.stage.store_file))


@fault("trainer's queue locked for 8 s")
async def queue_locked(siege: Siege) -> int:
    return await _locked(siege.stage, siege.stage.trainer_home / "queue.db", 8.0)


@fault("file of the store away for 5 s", "records", kills=False)
async def store_file_away(siege: Siege) -> int:
    with _database_moved(siege.stage.store_file) as moved:
        await asyncio.sleep(5.0)
        return 0 if siege.stage.store_file.exists() else moved


@fault("file of the trainer's queue away for 5 s", kills=False)
async def queue_file_away(siege: Siege) -> int:
    file = siege.stage.trainer_home / "queue.db"
    with _database_moved(file) as moved:
        await asyncio.sleep(5.0)
        return 0 if file.exists() else moved


@contextmanager
def _database_moved(file: Path) -> Iterator[int]:
    """A database and its log are elsewhere for a while, as when a disk is unmounted and comes back; how many files."""
    away = file.parent / f".{file.name}.away"
    away.mkdir()
    for part in sorted(file.parent.glob(f"{file.name}*")):  # itself first: without its log it is not what it was
        part.rename(away / part.name)
    try:
        yield len(list(away.iterdir()))
    finally:
        for part in file.parent.glob(f"{file.name}*"):
            part.unlink()
        for part in sorted(away.iterdir(), reverse=True):
            part.rename(file.parent / part.name)
        away.rmdir()


@fault("the store's log checkpointed while all write")
async def checkpointed(siege: Siege) -> int:
    """How many pages were put back."""
    pages = 0
    for _ in range(5):
        with contextlib.closing(sqlite3.connect(siege.stage.store_file, timeout=5)) as c:
            pages += max(0, c.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[2])
            c.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        await asyncio.sleep(0.5)
    return pages
