"""Kills and breaks the whole system under traffic, and compares what clients received with what is kept.

    python -m tests.faults [--kills 200] [--vllm-kills 5] [--faults all] [--seed 1] [--minutes 60] [--json FILE]

Ctrl-C or SIGTERM ends it early: what was done until then is audited and printed all the same. Runs with different
seeds add up. See docs/reliability.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from demo.models import model_path
from tests.faults import points
from tests.faults.clients import Clients
from tests.faults.killer import Killer
from tests.faults.report import print_tables, result_of
from tests.faults.scripted import FAULTS, Fault
from tests.faults.siege import Siege
from tests.faults.stage import standing

NAMESPACE = "METACLAW_TEST_NAMESPACE"
SHARES = {"worker": 5, "trainer": 5, "gateway-worker": 6, "gateway": 1}  # of the kills at random moments
SETTLE = 120.0  # seconds at the end for what is left to be trained


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; 0 if nothing was wrong."""
    given = _parser().parse_args(arguments)
    if given.list:
        print("\n".join(f"{i + 1:3} {fault.name} (may cost {fault.cost})" for i, fault in enumerate(FAULTS)))
        print("points: " + ", ".join(points.POINTS))
        return 0
    _own_mounts()
    folder = Path(given.folder or tempfile.mkdtemp(prefix="metaclaw-faults-"))
    result = asyncio.run(run(folder, given))
    print_tables(result)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["clean"] and given.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"logs: {folder}")
    return 0 if result["clean"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs and SIGTERMs of our processes")
    parser.add_argument("--vllm-kills", type=int, default=5)
    parser.add_argument("--faults", default="all", help="all, none, or places in the list, such as 1-9,12")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing new after so long")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--real-vllm", action="store_true", help="a real vLLM with the tiny model")
    parser.add_argument("--folder", help="where everything is kept; unset: a temporary one, kept if something is wrong")
    parser.add_argument("--json", type=Path, default=Path("runs/faults/faults.json"))
    parser.add_argument("--list", action="store_true", help="list faults and points, and end")
    return parser


def _own_mounts() -> None:
    """Begin again in a namespace of our own, so that the small disks go when this process does, however it ends."""
    if os.geteuid() != 0 or NAMESPACE in os.environ or shutil.which("unshare") is None:
        return
    command = ["unshare", "--mount", sys.executable, "-m", "tests.faults", *sys.argv[1:]]
    os.execvpe("unshare", command, {**os.environ, NAMESPACE: "1"})


def chosen_faults(text: str) -> list[Fault]:
    """What ``--faults`` means: all, none, or places in the list such as 1-9,12."""
    if text in ("all", "none"):
        return list(FAULTS) if text == "all" else []
    found: list[Fault] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += FAULTS[int(first) - 1 : int(last or first)]
    return found


async def run(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Start everything, break it, let it come to rest, audit."""
    chance, ended = random.Random(given.seed), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # before anything is started, which would be left behind
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    began = time.monotonic()
    async with standing(folder, model_path("tiny"), real_vllm=given.real_vllm, gated=True) as stage:
        started = time.monotonic() - began
        clients = Clients(stage, given.clients, given.seed, max_tokens=12 if given.real_vllm else 24)
        siege = Siege(Killer(stage, clients, chance, ended))
        talking = asyncio.create_task(clients.run())
        await siege.back(time.monotonic())
        deadline = time.monotonic() + given.minutes * 60
        try:
            await _break(siege, given, chance, deadline)
            await siege.stage.all_answer()
            await siege.back(time.monotonic())
        finally:
            await siege.settle(SETTLE if not siege.ended.is_set() else 60.0)
            clients.stop()
            await talking
        failures = await siege.audit()
        return result_of(siege, failures, seed=given.seed, started=started, seconds=time.monotonic() - began)


async def _break(siege: Siege, given: argparse.Namespace, chance: random.Random, deadline: float) -> None:
    """Kills in one row, faults in another, both at the same time."""
    kills = [*_kills(given.kills, chance), *(("vllm", signal.SIGKILL) for _ in range(given.vllm_kills))]
    faults = chosen_faults(given.faults)
    chance.shuffle(kills)
    chance.shuffle(faults)
    async with asyncio.TaskGroup() as group:
        group.create_task(_kill_all(siege, kills, chance, deadline))
        group.create_task(_fault_all(siege, faults, deadline))


async def _fault_all(siege: Siege, faults: list[Fault], deadline: float) -> None:
    for done, fault in enumerate(faults):
        if siege.ended.is_set() or time.monotonic() > deadline:
            print(f"{len(faults) - done} of {len(faults)} faults are left", flush=True)
            return
        try:
            row = await siege.fault(fault.name, fault.cost, fault.work, fault.kills)
            print(
                f"{row.name}: {row.seconds:.0f} s, touched {row.touched}, {row.requests} requests, "
                f"{row.missing} not stored",
                flush=True,
            )
        except (TimeoutError, aiohttp.ClientError, OSError, sqlite3.Error) as error:
            siege.findings.blame("not back", f"during {fault.name}: {error!r}")


async def _kill_all(
    siege: Siege, orders: list[tuple[str, signal.Signals]], chance: random.Random, deadline: float
) -> None:
    of = len(orders)
    while orders:
        if siege.ended.is_set() or time.monotonic() > deadline:
            print(f"{len(orders)} of {of} kills are left", flush=True)
            return
        await asyncio.sleep(chance.uniform(0.05, 1.0))
        async with siege.killer.busy:
            place = next((i for i, order in enumerate(orders) if siege.killer.is_due(order)), None)
            if place is None:
                continue
            name, number = orders.pop(place)
            try:
                if name not in points.POINTS:
                    await siege.killer.kill(name, number)
                elif not await siege.killer.kill_at(name, number):
                    print(f"nobody passed {name} in time", flush=True)
                    orders.append((chance.choice(("worker", "trainer")), number))
            except TimeoutError as error:
                siege.findings.blame("not back", f"after the kill of {name}: {error}")
        if sum(siege.killer.kills.values()) % 20 == 0:
            print(f"{sum(siege.killer.kills.values())}/{of} {dict(siege.killer.kills)}", flush=True)


def _kills(count: int, chance: random.Random) -> list[tuple[str, signal.Signals]]:
    """Half at named points, each as often as the others; half at random moments. Two in three by SIGKILL."""
    named = list(points.POINTS)
    chance.shuffle(named)
    at_points = [named[i % len(named)] for i in range(count // 2)]
    at_random = chance.choices(list(SHARES), weights=list(SHARES.values()), k=count - len(at_points))
    signals = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)
    return [(name, chance.choice(signals)) for name in [*at_points, *at_random]]


if __name__ == "__main__":
    sys.exit(main())
