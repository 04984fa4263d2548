"""What benchmarks.soak sees while it goes on: latency, memory and processor of each process, queues; their slopes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import psutil

from benchmarks.soak_load import Load, Reply
from tests.faults.stage import AGENTS, BATCH, Stage

WARM = 60.0  # seconds after which slopes are taken: caches fill, and the first batches are gathered
LEFT = (BATCH - 1) * len(AGENTS)  # samples that wait for a full batch for ever

Row = dict[str, Any]


class Watch:
    """Rows of figures about a stage under one load."""

    def __init__(self, stage: Stage, load: Load) -> None:
        self._stage = stage
        self._load = load
        self._began = self._last = time.monotonic()
        self._seen = self._skipped = self._late = 0
        self._used = busy(self._pids())

    async def rows(self, seconds: float, every: float, stopped: asyncio.Event, *, shown: bool) -> list[Row]:
        """Let the load run for so long, and look every so often; the last answers are waited for."""
        rows: list[Row] = []
        task = asyncio.create_task(self._load.run())
        while time.monotonic() < self._began + seconds and not stopped.is_set() and not task.done():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopped.wait(), every)
            rows.append(await self._row())
            if shown:
                print(json.dumps(rows[-1]), flush=True)
        self._load.stop()
        await task
        return rows

    async def _row(self) -> Row:
        load, now = self._load, time.monotonic()
        fresh, self._seen = load.replies[self._seen :], len(load.replies)
        pids = self._pids()
        used = busy(pids)
        row = {
            "at": round(now - self._began, 1),
            "seconds": round(now - self._last, 2),
            **latency(fresh),
            "open": load.busy,
            "skipped": load.skipped - self._skipped,
            "late": load.late - self._late,
            "pids": pids,
            "memory": memory(pids),
            "cores": {n: round((s - self._used.get(n, 0.0)) / (now - self._last), 2) for n, s in used.items()},
            **await asyncio.to_thread(looked_at, self._stage),
        }
        self._last, self._used, self._skipped, self._late = now, used, load.skipped, load.late
        return row

    def _pids(self) -> dict[str, int]:
        stage = self._stage
        found = {f"gateway {i + 1}": pid for i, pid in enumerate(sorted(stage.gateway_workers()))}
        found |= {"worker": stage.pid("worker"), "trainer": stage.pid("trainer"), "upstream": stage.vllm.pid}
        return found | {"this program": psutil.Process().pid}


def memory(pids: Mapping[str, int]) -> dict[str, float]:
    """Resident MiB of each process that is there."""
    return {name: round(each.memory_info().rss / 2**20, 1) for name, each in _alive(pids)}


def processor(pids: Mapping[str, int]) -> dict[str, float]:
    """Seconds of processor that each process that is there has used."""
    return {name: sum(each.cpu_times()[:2]) for name, each in _alive(pids)}


def busy(pids: Mapping[str, int]) -> dict[str, float]:
    """The same, and what all else on the machine has used: a run beside other work measures that too."""
    found, times = processor(pids), psutil.cpu_times()
    return found | {"all else": sum(times) - times.idle - times.iowait - sum(found.values())}


def _alive(pids: Mapping[str, int]) -> Iterator[tuple[str, psutil.Process]]:
    """One that dies is left out; that its successor has another id is seen in the rows."""
    for name, pid in pids.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            yield name, psutil.Process(pid)


def looked_at(stage: Stage) -> dict[str, Any]:
    """What waits in each queue, how many versions there are, and the size of the stores in MiB."""
    queue = stage.trainer_home / "queue.db"
    with contextlib.closing(sqlite3.connect(stage.store_file, timeout=20)) as c:
        unscored = c.execute("SELECT COUNT(*) FROM traces WHERE score = 'waiting'").fetchone()[0]
        query = "SELECT COUNT(*) FROM traces WHERE score = 'scored' AND forward IN ('waiting', 'merged')"
        unforwarded = c.execute(query).fetchone()[0]
    with contextlib.closing(sqlite3.connect(queue, timeout=20)) as c:
        untrained = c.execute("SELECT COUNT(*) FROM samples WHERE state IN ('waiting', 'claimed')").fetchone()[0]
        versions = c.execute("SELECT COUNT(*) FROM versions").fetchone()[0]
    sizes = {name: sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*")) / 2**20
             for name, path in (("store", stage.store_file), ("queue", queue))}  # fmt: skip
    return {
        "waits": {"unscored": unscored, "unforwarded": unforwarded, "untrained": untrained},
        "versions": versions,
        "sizes": {name: round(size, 1) for name, size in sizes.items()},
    }


async def until_idle(stage: Stage, limit: float, stopped: asyncio.Event) -> float | None:
    """Seconds until nothing waits to be scored, forwarded or trained; None: not within ``limit``."""
    began = time.monotonic()
    while time.monotonic() < began + limit and not stopped.is_set():
        waits = (await asyncio.to_thread(looked_at, stage))["waits"]
        if waits["unscored"] + waits["unforwarded"] == 0 and waits["untrained"] <= LEFT:
            return round(time.monotonic() - began, 1)
        await asyncio.sleep(0.5)
    return None


def not_stored(stage: Stage, replies: Sequence[Reply]) -> int:
    """Answers that were received whole and named a trace that the store does not hold."""
    with contextlib.closing(sqlite3.connect(stage.store_file, timeout=20)) as c:
        stored = {row[0] for row in c.execute("SELECT id FROM traces")}
    return sum(one.whole and bool(one.trace) and one.trace not in stored for one in replies)


def latency(replies: Sequence[Reply]) -> dict[str, Any]:
    """Seconds of the answers that were whole, to a stream's first bytes and to the end; and how many were not."""
    whole = [one for one in replies if one.whole]
    return {
        "requests": len(replies),
        "failed": len(replies) - len(whole),
        "first": cuts([one.first - one.due for one in whole if one.stream]),
        "took": cuts([one.ended - one.due for one in whole]),
    }


def cuts(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile, and the longest; nothing of nothing."""
    ordered = sorted(values)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    found = {name: ordered[int(len(ordered) * share)] for name, share in shares.items()} if ordered else {}
    return {name: round(value, 4) for name, value in (found | ({"max": ordered[-1]} if ordered else {})).items()}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """How much a second, by least squares; 0 of fewer than three points."""
    if len(points) < 3:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def slopes(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Of each queue (items a second) and each process's memory (MiB a minute), and what that adds up to."""
    seconds = rows[-1]["at"] - rows[0]["at"] if rows else 0.0
    queues = (
        {name: slope([(row["at"], queue_of(row)[name]) for row in rows]) for name in queue_of(rows[0])} if rows else {}
    )
    sizes = {name: slope([(row["at"], row["memory"][name]) for row in rows if name in row["memory"]])
             for name in (rows[0]["memory"] if rows else ())}  # fmt: skip
    return {
        "of_seconds": {"from": rows[0]["at"] if rows else 0.0, "to": rows[-1]["at"] if rows else 0.0},
        "queues_per_second": {name: round(value, 3) for name, value in queues.items()},
        "queues_grew": {name: round(value * seconds, 1) for name, value in queues.items()},
        "mib_per_minute": {name: round(value * 60, 3) for name, value in sizes.items()},
        "mib_grew": {name: round(value * seconds, 1) for name, value in sizes.items()},
    }


def queue_of(row: Row) -> dict[str, int]:
    """What waits, requests under way among it."""
    return {"open": row["open"], **row["waits"]}


def settled(rows: Sequence[Row], after: float) -> list[Row]:
    """The rows of the time after ``after`` seconds."""
    return [row for row in rows if row["at"] > after]
