"""Faults that are made on purpose, one after the other: network, disk, database, files, clocks, absences.

Each says what it may cost: nothing at all; requests, because what answers them is away; or records, because the store
does not take them, and then every missing one must be counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from tests.faults import points
from tests.faults.disk import Disk
from tests.faults.killer import Cost
from tests.faults.siege import Siege
from tests.faults.stage import AGENTS, REWARD, Stage

Work = Callable[[Siege], Awaitable[None]]
HOUR = 3600.0
ROLES = ("gateway", "worker", "trainer")


@dataclass(frozen=True)
class Fault:
    """One entry of the list."""

    name: str
    cost: Cost
    work: Work
    kills: bool = True  # processes may be killed meanwhile; not where one that starts would begin anew elsewhere


FAULTS: list[Fault] = []


def fault(name: str, cost: Cost = "nothing", *, kills: bool = True) -> Callable[[Work], Work]:
    """Put a function into the list."""

    def add(work: Work) -> Work:
        FAULTS.append(Fault(name, cost, work, kills))
        return work

    return add


def _on_link(link: str, mode: str, seconds: float, **values: float) -> Work:
    async def work(siege: Siege) -> None:
        async with siege.link(link, mode, **values):
            await asyncio.sleep(seconds)

    return work


fault("worker-trainer: refused")(_on_link("worker-trainer", "refuse", 4.0))
fault("worker-trainer: slow")(_on_link("worker-trainer", "slow", 5.0, delay=0.4))
fault("worker-trainer: cut in the answer")(_on_link("worker-trainer", "cut", 5.0, after=150))
fault("worker-trainer: cut in the request")(_on_link("worker-trainer", "cut-up", 5.0, after=700))
fault("worker-trainer: silent")(_on_link("worker-trainer", "silent", 5.0))
fault("trainer-vllm: refused")(_on_link("trainer-vllm", "refuse", 5.0))
fault("trainer-vllm: cut in the answer")(_on_link("trainer-vllm", "cut", 5.0, after=150))
fault("worker-vllm: refused")(_on_link("worker-vllm", "refuse", 5.0))
fault("gateway-vllm: refused", "requests")(_on_link("gateway-vllm", "refuse", 3.0))
fault("gateway-vllm: cut in the answer", "requests")(_on_link("gateway-vllm", "cut", 4.0, after=900))
fault("gateway-vllm: slow")(_on_link("gateway-vllm", "slow", 5.0, delay=0.2))
fault("gateway-vllm: silent")(_on_link("gateway-vllm", "silent", 4.0))


@contextmanager
def _held(siege: Siege, name: str) -> Iterator[None]:
    """The process ``name`` is killed and not started again while the block runs."""
    siege.stage.order(f"hold {name}")
    if pid := siege.stage.pid(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    try:
        yield
    finally:
        siege.stage.order(f"free {name}")


@fault("trainer away for 25 s")
async def trainer_away(siege: Siege) -> None:
    with _held(siege, "trainer"):
        await asyncio.sleep(25.0)


@fault("worker away for 15 s")
async def worker_away(siege: Siege) -> None:
    with _held(siege, "worker"):
        await asyncio.sleep(15.0)


@fault("vllm restarted by SIGTERM", "requests")
async def vllm_restarted(siege: Siege) -> None:
    await siege.killer.restart_vllm(signal.SIGTERM)


@fault("vllm forgets every adapter")
async def vllm_forgets(siege: Siege) -> None:
    for _ in range(3):
        await _unload_all(siege)
        await asyncio.sleep(1.0)


async def _unload_all(siege: Siege) -> None:
    url = f"http://127.0.0.1:{siege.stage.vllm_port}"
    with contextlib.suppress(aiohttp.ClientConnectionError):  # killed just now: it has forgotten all by itself
        async with aiohttp.ClientSession() as http:
            async with http.get(f"{url}/v1/models") as answer:
                models = (await answer.json())["data"]
            for model in models:
                if model["parent"] is not None:
                    async with http.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": model["id"]}):
                        pass


@fault("the adapters' files away, and vllm forgets them", kills=False)
async def adapters_away(siege: Siege) -> None:
    with _moved(siege.stage.trainer_home / "adapters"):
        await _unload_all(siege)
        await asyncio.sleep(4.0)


@fault("the checkpoints away for 6 s", kills=False)
async def checkpoints_away(siege: Siege) -> None:
    with _moved(siege.stage.trainer_home / "adapters"):
        await siege.killer.kill("trainer", signal.SIGKILL)
        await asyncio.sleep(6.0)


@contextmanager
def _moved(path: Path) -> Iterator[None]:
    """The folder ``path`` is elsewhere while the block runs; what was made in its place meanwhile is kept."""
    away = path.with_name(f".{path.name}.away")
    path.mkdir(parents=True, exist_ok=True)
    path.rename(away)
    try:
        yield
    finally:
        for made in path.glob("*/v*"):  # a version that was listed meanwhile
            (away / made.parent.name).mkdir(exist_ok=True)
            made.rename(away / made.parent.name / made.name)
        shutil.rmtree(path, ignore_errors=True)
        away.rename(path)


@contextmanager
def _full(disk: Disk, pids: list[int]) -> Iterator[None]:
    """No room on ``disk``, or for ``pids`` to write in, while the block runs."""
    disk.fill(pids)
    try:
        yield
    finally:
        disk.free()


def _store_disk_full(stage: Stage) -> contextlib.AbstractContextManager[None]:
    return _full(stage.store_disk, [*stage.gateway_workers(), stage.pid("worker")])


@fault("disk of the store full", "records")
async def store_disk_full(siege: Siege) -> None:
    with _store_disk_full(siege.stage):
        await asyncio.sleep(6.0)


@fault("disk of the trainer full")
async def trainer_disk_full(siege: Siege) -> None:
    with _full(siege.stage.trainer_disk, [siege.stage.pid("trainer")]):
        await asyncio.sleep(6.0)


@fault("disk of the store full, and the worker killed", "records")
async def store_disk_full_and_kill(siege: Siege) -> None:
    with _store_disk_full(siege.stage):
        await asyncio.sleep(1.0)
        await siege.killer.kill("worker", signal.SIGKILL)
        await asyncio.sleep(4.0)


@fault("store locked for 1 s")
async def store_locked_briefly(siege: Siege) -> None:
    with siege.stage.locked(siege.stage.store_file):
        await asyncio.sleep(1.0)


@fault("store locked for 8 s", "records")
async def store_locked(siege: Siege) -> None:
    with siege.stage.locked(siege.stage.store_file):
        await asyncio.sleep(8.0)


@fault("trainer's queue locked for 8 s")
async def queue_locked(siege: Siege) -> None:
    with siege.stage.locked(siege.stage.trainer_home / "queue.db"):
        await asyncio.sleep(8.0)


@fault("file of the store away for 5 s", "records", kills=False)
async def store_file_away(siege: Siege) -> None:
    with _database_moved(siege.stage.store_file):
        await asyncio.sleep(5.0)


@fault("file of the trainer's queue away for 5 s", kills=False)
async def queue_file_away(siege: Siege) -> None:
    with _database_moved(siege.stage.trainer_home / "queue.db"):
        await asyncio.sleep(5.0)


@contextmanager
def _database_moved(file: Path) -> Iterator[None]:
    """A database and its log are elsewhere for a while, as when a disk is unmounted and comes back."""
    away = file.parent / f".{file.name}.away"
    away.mkdir()
    for part in sorted(file.parent.glob(f"{file.name}*")):  # itself first: without its log it is not what it was
        part.rename(away / part.name)
    try:
        yield
    finally:
        for part in file.parent.glob(f"{file.name}*"):
            part.unlink()
        for part in sorted(away.iterdir(), reverse=True):
            part.rename(file.parent / part.name)
        away.rmdir()


def _clocks(off: float, roles: tuple[str, ...]) -> Work:
    async def work(siege: Siege) -> None:
        for role in roles:
            points.set_clock(siege.stage.folder, role, off)
        await asyncio.sleep(6.0)
        for role in roles:
            points.set_clock(siege.stage.folder, role, 0.0)
        await asyncio.sleep(1.0)

    return work


fault("all clocks an hour ahead, and back")(_clocks(HOUR, ROLES))
fault("all clocks an hour behind, and back")(_clocks(-HOUR, ROLES))
fault("the worker's clock an hour ahead, and back")(_clocks(HOUR, ("worker",)))
fault("the trainer's clock a day behind, and back")(_clocks(-24 * HOUR, ("trainer",)))


@fault("the worker frozen for 14 s, another takes over", "records")
async def worker_frozen(siege: Siege) -> None:
    """It may be frozen in the middle of a transaction, and SQLite is locked then."""
    pid = siege.stage.pid("worker")
    siege.stage.order("free worker-2")
    with contextlib.suppress(ProcessLookupError):  # it may be killed meanwhile
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(14.0)
        os.kill(pid, signal.SIGCONT)
    await asyncio.sleep(2.0)
    siege.stage.order("hold worker-2")
    if pid := siege.stage.pid("worker-2"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


@fault("a gateway worker frozen for 4 s")
async def gateway_frozen(siege: Siege) -> None:
    pid = siege.killer.chance.choice(siege.stage.gateway_workers())
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(4.0)
        os.kill(pid, signal.SIGCONT)


@fault("the gateway restarted by SIGTERM", "requests")
async def gateway_restarted(siege: Siege) -> None:
    await siege.killer.kill("gateway", signal.SIGTERM)


@fault("everything killed at once", "requests")
async def power_cut(siege: Siege) -> None:
    for name in ("worker", "trainer"):
        await siege.killer.kill(name, signal.SIGKILL)
    await asyncio.gather(siege.killer.kill("vllm", signal.SIGKILL), siege.killer.kill("gateway", signal.SIGKILL))


@fault("a reward that raises, then one that hangs")
async def bad_reward(siege: Siege) -> None:
    hook = siege.stage.settings.home / "hooks" / "parity.py"
    for body in ("raise ValueError('on purpose')", "import time; time.sleep(3600)"):
        hook.write_text(f"def score_trace(trace):\n    {body}\n", encoding="utf-8")
        await asyncio.sleep(4.0)
    hook.write_text(REWARD, encoding="utf-8")


@fault("the head put back by its owner, again and again")
async def head_put_back(siege: Siege) -> None:
    """A step that runs meanwhile is thrown away; its samples must be trained once all the same."""
    url = f"http://127.0.0.1:{siege.stage.trainer_port}"
    async with aiohttp.ClientSession() as http:
        for number in range(12):
            agent = AGENTS[number % len(AGENTS)]
            async with http.get(f"{url}/v1/agents/{agent}") as answer:
                head = (await answer.json())["head"]
            async with http.post(f"{url}/v1/agents/{agent}/head", json={"version": head}):
                await asyncio.sleep(0.4)


@fault("the store's log checkpointed while all write")
async def checkpointed(siege: Siege) -> None:
    for _ in range(5):
        with contextlib.closing(sqlite3.connect(siege.stage.store_file, timeout=5)) as c:
            c.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        await asyncio.sleep(0.5)
