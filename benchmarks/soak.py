"""The whole system under steady load for long: latency over time, memory of each process, queues, errors.

    python -m benchmarks.soak [--minutes 30] [--clients 16] [--share 0.7] [--json FILE]
    python -m benchmarks.soak --streams 512 [--minutes 2]

Gateway, worker and trainer are real, with the tiny model; the upstream is wire-true and costs little. First the clients
ask without a pause, which says what the gateway can do here with everything else beside it; then they pause so that
they ask for ``share`` of that, for so long. Three turns make a conversation, and all of it is trained.

With ``--streams`` there is one gateway process, and so many streams are open at once, each for half a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from demo.models import model_path
from tests.faults.clients import Asked, Clients
from tests.faults.stage import Stage, standing

PEAK_SECONDS = 20.0
ROW_SECONDS = 10.0
STREAM_PIECE = 5.0  # seconds between two pieces of a stream, of which there are six


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--share", type=float, default=0.7, help="of the highest rate, that is asked for")
    parser.add_argument("--streams", type=int, default=0, help="so many streams at once, on one gateway process")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = asyncio.run(streams(given) if given.streams else soak(given))
    show(found)
    target = given.json or Path("runs/benchmarks") / ("streams.json" if given.streams else "soak.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


async def soak(given: argparse.Namespace) -> dict[str, Any]:
    """The highest rate, then rows of figures while ``share`` of it is asked for."""
    with tempfile.TemporaryDirectory(prefix="metaclaw-soak-") as folder:
        async with standing(Path(folder), model_path("tiny"), breakable=False) as stage:
            stopped = stop_signals()
            warm = await talk(Clients(stage, given.clients, 1, pause=0.0), PEAK_SECONDS / 2, stopped)
            peak = await talk(Clients(stage, given.clients, 2, pause=0.0), PEAK_SECONDS, stopped)
            rate = len(peak) / PEAK_SECONDS
            seconds = statistics.median(one.ended - one.began for one in peak)
            pause = max(0.0, given.clients / (given.share * rate) - seconds)
            clients = Clients(stage, given.clients, 3, pause=pause)
            rows = await watched(stage, clients, given.minutes * 60, stopped)
            rest = await until_idle(stage, 120.0, stopped)
            return {
                **summary(clients.asked, rows, stage),
                "peak_rate": rate,
                "share": given.share,
                "clients": given.clients,
                "idle_after": rest,
                "stored": stored(stage) - len([one for one in [*warm, *peak] if one.whole]),
                "counted": await stage.counted(),
            }


async def streams(given: argparse.Namespace) -> dict[str, Any]:
    """``given.streams`` streams at once on one gateway process."""
    with tempfile.TemporaryDirectory(prefix="metaclaw-soak-") as folder:
        async with standing(Path(folder), model_path("tiny"), workers=1, breakable=False, pause=STREAM_PIECE) as stage:
            stopped = stop_signals()
            clients = Clients(stage, given.streams, 1, pause=0.0, streams=1.0, patience=300.0)
            rows = await watched(stage, clients, given.minutes * 60, stopped)
            return {
                **summary(clients.asked, rows, stage),
                "streams": given.streams,
                "stored": stored(stage),
                "counted": await stage.counted(),
            }


def stop_signals() -> asyncio.Event:
    """Set by Ctrl-C or SIGTERM: what was seen until then is printed all the same."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


async def talk(clients: Clients, seconds: float, stopped: asyncio.Event) -> list[Asked]:
    task = asyncio.create_task(clients.run())
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopped.wait(), seconds)
    clients.stop()
    await task
    return clients.asked


async def watched(stage: Stage, clients: Clients, seconds: float, stopped: asyncio.Event) -> list[dict[str, Any]]:
    """Let them talk, and look every ten seconds; the last answers are waited for."""
    began, seen = time.monotonic(), 0
    rows: list[dict[str, Any]] = []
    task = asyncio.create_task(clients.run())
    while time.monotonic() < began + seconds and not stopped.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), ROW_SECONDS)
        fresh = clients.asked[seen:]
        seen += len(fresh)
        row = {"at": round(time.monotonic() - began), **latency(fresh), **await asyncio.to_thread(looked_at, stage)}
        row["open"] = clients.busy
        rows.append(row)
        print(json.dumps(row), flush=True)
    clients.stop()
    await task
    return rows


def latency(asked: Sequence[Asked]) -> dict[str, Any]:
    """Of the answers that were whole, in seconds; and how many were not."""
    took = sorted(one.ended - one.began for one in asked if one.whole)
    cut = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        "requests": len(asked),
        "failed": len(asked) - len(took),
        **{name: took[int(len(took) * share)] if took else None for name, share in cut.items()},
    }


def looked_at(stage: Stage) -> dict[str, Any]:
    """Resident MiB of each process, what waits in each queue, and the size of the stores in MiB."""
    pids = {f"gateway {i + 1}": pid for i, pid in enumerate(sorted(stage.gateway_workers()))}
    pids |= {"worker": stage.pid("worker"), "trainer": stage.pid("trainer")}
    with sqlite3.connect(stage.store_file, timeout=20) as c:
        unscored = c.execute("SELECT COUNT(*) FROM traces WHERE score = 'waiting'").fetchone()[0]
        query = "SELECT COUNT(*) FROM traces WHERE score = 'scored' AND forward IN ('waiting', 'merged')"
        unsent = c.execute(query).fetchone()[0]
    with sqlite3.connect(stage.trainer_home / "queue.db", timeout=20) as c:
        queued = c.execute("SELECT COUNT(*) FROM samples WHERE state IN ('waiting', 'claimed')").fetchone()[0]
        versions = c.execute("SELECT COUNT(*) FROM versions").fetchone()[0]
    sizes = {name: sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*")) / 2**20
             for name, path in (("store", stage.store_file), ("queue", stage.trainer_home / "queue.db"))}  # fmt: skip
    return {
        "memory": {name: round(psutil.Process(pid).memory_info().rss / 2**20, 1) for name, pid in pids.items()},
        "waits": {"unscored": unscored, "unsent": unsent, "untrained": queued},
        "versions": versions,
        "sizes": {name: round(size, 1) for name, size in sizes.items()},
    }


async def until_idle(stage: Stage, limit: float, stopped: asyncio.Event) -> float | None:
    """Seconds until no trace waits to be scored or sent; None: not within ``limit``."""
    began = time.monotonic()
    while time.monotonic() < began + limit and not stopped.is_set():
        waits = (await asyncio.to_thread(looked_at, stage))["waits"]
        if waits["unscored"] + waits["unsent"] == 0:
            return round(time.monotonic() - began, 1)
        await asyncio.sleep(0.5)
    return None


def stored(stage: Stage) -> int:
    """Traces in the store."""
    with sqlite3.connect(stage.store_file, timeout=20) as c:
        return int(c.execute("SELECT COUNT(*) FROM traces").fetchone()[0])


def summary(asked: list[Asked], rows: list[dict[str, Any]], stage: Stage) -> dict[str, Any]:
    """What all rows together say."""
    errors: dict[str, int] = {}
    for one in asked:
        if not one.whole:
            errors[one.error[:80]] = errors.get(one.error[:80], 0) + 1
    return {
        "machine": f"{os.cpu_count()}-core {os.uname().machine}, no GPU",
        "seconds": rows[-1]["at"],
        "all": latency(asked),
        "errors": errors,
        "rows": rows,
        "unrecorded": sum(one.whole and not one.trace for one in asked),
        "gateway_processes": stage.settings.gateway.workers,
    }


def show(found: dict[str, Any]) -> None:
    """One line for each of at most fifteen stretches of the run."""
    rows = found["rows"]
    step = max(1, len(rows) // 15)
    names = list(rows[0]["memory"])
    print(f"\n{found['machine']}; {found['gateway_processes']} gateway process(es), {found['seconds']} s")
    heads = ["minute", "requests/s", "open", "p50, s", "p95, s", "p99, s", "failed", *(f"{n}, MiB" for n in names)]
    heads += ["unscored", "unsent", "untrained", "versions", "store, MiB"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for first in range(0, len(rows), step):
        part = rows[first : first + step]
        last, requests = part[-1], sum(row["requests"] for row in part)
        cells: list[object] = [f"{last['at'] / 60:.1f}", f"{requests / (len(part) * ROW_SECONDS):.1f}", last["open"]]
        for cut in ("p50", "p95", "p99"):
            values = [row[cut] for row in part if row[cut] is not None]
            cells.append(f"{statistics.median(values):.2f}" if values else "-")
        cells += [sum(row["failed"] for row in part), *(f"{last['memory'].get(name, 0):.0f}" for name in names)]
        cells += [*last["waits"].values(), last["versions"], last["sizes"]["store"]]
        print("| " + " | ".join(map(str, cells)) + " |")
    print({key: value for key, value in found.items() if key != "rows"})


if __name__ == "__main__":
    main()
