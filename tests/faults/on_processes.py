"""Faults of processes: away, frozen, started again, forgetful; and of what the worker and trainer are told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import time

import aiohttp
import psutil

from tests.faults import points
from tests.faults.fault_list import MEET, fault, until
from tests.faults.siege import Siege
from tests.faults.stage import AGENTS, REWARD, Stage


def _signal(pid: int, number: signal.Signals) -> None:
    """To ``pid``, if it still runs; 0 is nobody."""
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def _away(siege: Siege, name: str, seconds: float) -> int:
    """The process ``name`` is killed and not started again for so long; 1 if it was gone all the time."""
    siege.stage.order(f"hold {name}")
    _signal(siege.stage.pid(name), signal.SIGKILL)
    try:
        gone = await until(lambda: not siege.stage.pid(name))
        await asyncio.sleep(seconds)
        return int(gone and not siege.stage.pid(name))
    finally:
        siege.stage.order(f"free {name}")


@fault("trainer away for 25 s")
async def trainer_away(siege: Siege) -> int:
    return await _away(siege, "trainer", 25.0)


@fault("worker away for 15 s")
async def worker_away(siege: Siege) -> int:
    return await _away(siege, "worker", 15.0)


@fault("vllm restarted by SIGTERM", "requests")
async def vllm_restarted(siege: Siege) -> int:
    old = siege.stage.vllm.pid
    await siege.killer.restart_vllm(signal.SIGTERM)
    return int(siege.stage.vllm.pid != old)


@fault("vllm forgets every adapter")
async def vllm_forgets(siege: Siege) -> int:
    forgotten, deadline = 0, time.monotonic() + MEET
    for _ in range(3):
        forgotten += await unload_all(siege)
        await asyncio.sleep(1.0)
    while not forgotten and time.monotonic() < deadline:
        forgotten += await unload_all(siege)
        await asyncio.sleep(0.2)
    return forgotten


async def unload_all(siege: Siege) -> int:
    """How many adapters vLLM has forgotten."""
    url, forgotten = f"http://127.0.0.1:{siege.stage.vllm_port}", 0
    with contextlib.suppress(aiohttp.ClientConnectionError):  # killed just now: it has forgotten all by itself
        async with aiohttp.ClientSession() as http:
            async with http.get(f"{url}/v1/models") as answer:
                models = (await answer.json())["data"]
            for model in models:
                if model["parent"] is not None:
                    async with http.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": model["id"]}) as answer:
                        forgotten += answer.status == 200
    return forgotten


@fault("the worker frozen with traces in hand, another takes over", kills=False)
async def worker_frozen(siege: Siege) -> int:
    """How many of the traces that the frozen one had leased were scored by the other."""
    stage = siege.stage
    pid = stage.pid("worker")
    if not (held := await _freeze_with_leases(siege)):
        return 0
    try:
        stage.order("free worker-2")
        await until(lambda: stage.pid("worker-2"))
        await until(lambda: not _unscored(stage, held), 60.0)
        taken = len(held) - len(_unscored(stage, held))  # by nobody but worker-2: the other is still frozen
        frozen = psutil.Process(pid).status() == psutil.STATUS_STOPPED
    finally:
        _signal(pid, signal.SIGCONT)
    await asyncio.sleep(2.0)
    stage.order("hold worker-2")
    _signal(stage.pid("worker-2"), signal.SIGTERM)
    await until(lambda: not stage.pid("worker-2"))
    return taken if frozen else 0


async def _freeze_with_leases(siege: Siege) -> set[str]:
    """Freeze the worker between scoring and storing, outside any transaction; the traces that it has leased."""
    stage = siege.stage
    for _ in range(10):
        points.arm(stage.folder, "score.stored", signal.SIGSTOP)
        await until(lambda: points.fired(stage.folder, "score.stored"))
        if points.disarm(stage.folder, "score.stored"):
            return set()  # nothing was scored for so long
        await asyncio.sleep(0.2)
        if not stage.is_locked(stage.store_file) and (held := _leased_by(stage, stage.pid("worker"))):
            return held
        _signal(stage.pid("worker"), signal.SIGCONT)
        await asyncio.sleep(0.5)
    return set()


def _leased_by(stage: Stage, pid: int) -> set[str]:
    with contextlib.closing(sqlite3.connect(stage.store_file, timeout=5)) as c:
        query = "SELECT id FROM traces WHERE score = 'waiting' AND lease_owner LIKE ?"
        return {row[0] for row in c.execute(query, (f"%:{pid}:%",))}


def _unscored(stage: Stage, held: set[str]) -> set[str]:
    with contextlib.closing(sqlite3.connect(stage.store_file, timeout=5)) as c:
        return held & {row[0] for row in c.execute("SELECT id FROM traces WHERE score = 'waiting'")}


@fault("the worker frozen for 8 s in a transaction", "records", kills=False)
async def worker_frozen_in_transaction(siege: Siege) -> int:
    """SQLite is locked by it; a turn that found nothing to claim holds no lock, so the next is tried."""
    stage = siege.stage
    for _ in range(10):
        points.arm(stage.folder, "score.claimed", signal.SIGSTOP)
        await until(lambda: points.fired(stage.folder, "score.claimed"))
        if points.disarm(stage.folder, "score.claimed"):
            return 0
        await asyncio.sleep(0.2)
        if locked := stage.is_locked(stage.store_file):
            await asyncio.sleep(8.0)
            locked = stage.is_locked(stage.store_file)
        _signal(stage.pid("worker"), signal.SIGCONT)
        if locked:
            return 1
        await asyncio.sleep(0.5)
    return 0


@fault("a gateway worker frozen for 4 s", kills=False)
async def gateway_frozen(siege: Siege) -> int:
    pid = siege.killer.chance.choice(siege.stage.gateway_workers())
    _signal(pid, signal.SIGSTOP)
    await asyncio.sleep(4.0)
    frozen = psutil.Process(pid).status() == psutil.STATUS_STOPPED
    _signal(pid, signal.SIGCONT)
    return int(frozen)


@fault("the gateway restarted by SIGTERM", "requests")
async def gateway_restarted(siege: Siege) -> int:
    old = siege.stage.gateway.pid
    await siege.killer.kill("gateway", signal.SIGTERM)
    return int(siege.stage.gateway.pid != old)


@fault("everything killed at once", "requests")
async def power_cut(siege: Siege) -> int:
    old = {siege.stage.gateway.pid, siege.stage.vllm.pid}
    for name in ("worker", "trainer"):
        await siege.killer.kill(name, signal.SIGKILL)
    await asyncio.gather(siege.killer.kill("vllm", signal.SIGKILL), siege.killer.kill("gateway", signal.SIGKILL))
    return len(old - {siege.stage.gateway.pid, siege.stage.vllm.pid})


@fault("a reward that raises, then one that hangs")
async def bad_reward(siege: Siege) -> int:
    """How often it failed."""
    stage = siege.stage
    hook = stage.settings.home / "hooks" / "parity.py"
    before = _hook_failures(stage)
    for body in ("raise ValueError('on purpose')", "import time; time.sleep(3600)"):
        hook.write_text(f"def score_trace(trace):\n    {body}\n", encoding="utf-8")
        await asyncio.sleep(4.0)
    await until(lambda: _hook_failures(stage) > before)
    hook.write_text(REWARD, encoding="utf-8")
    return _hook_failures(stage) - before


def _hook_failures(stage: Stage) -> int:
    with contextlib.closing(sqlite3.connect(stage.store_file, timeout=20)) as c:
        query = "SELECT COALESCE(SUM(value), 0) FROM counters WHERE name = 'hook_failures'"
        return int(c.execute(query).fetchone()[0])


@fault("the head put back by its owner, again and again")
async def head_put_back(siege: Siege) -> int:
    """A step that runs meanwhile is thrown away; its samples must be trained once all the same."""
    url, put = f"http://127.0.0.1:{siege.stage.trainer_port}", 0
    async with aiohttp.ClientSession() as http:
        for number in range(12):
            agent = AGENTS[number % len(AGENTS)]
            with contextlib.suppress(aiohttp.ClientConnectionError):  # the trainer may be killed meanwhile
                async with http.get(f"{url}/v1/agents/{agent}") as answer:
                    head = (await answer.json())["head"]
                async with http.post(f"{url}/v1/agents/{agent}/head", json={"version": head}) as answer:
                    put += answer.status == 200
            await asyncio.sleep(0.4)
    return put
