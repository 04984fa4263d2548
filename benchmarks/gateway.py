"""What the gateway costs: ours, plain LiteLLM and the upstream itself, taking turns in one run.

    python -m benchmarks.gateway [--part speed] [--part long] [--part memory] [--quick] [--json FILE]

All three are asked for the same recorded answers of a local upstream, in turns, so that what else the machine does hits
all alike. Ours commits every trace before the last byte; skills are retrieved from the starter library. Processor time
is that of the gateway's process, its threads included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from tests.gateway_server import PLAIN_KEY, GatewayServer, running_gateway, running_plain_litellm
from tests.replay_upstream import ReplayUpstream, Script
from tests.vllm_server import pick_free_port

MS = 1000.0
PARTS = ("speed", "long", "memory")
LONG = "lorem ipsum dolor sit " * 9091  # 200,002 characters
TURNS = 10  # of the long conversation


@dataclass(frozen=True)
class Side:
    """One way to the upstream."""

    name: str
    url: str
    key: str

    def process(self) -> psutil.Process | None:
        """The gateway's process; ``None`` for the upstream itself."""
        port = self.url.rpartition(":")[2]
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "litellm.proxy.proxy_cli" in line and port in line:
                return process
        return None


@dataclass(frozen=True)
class Timing:
    """Of one answer: seconds to the first byte of its body and to its last, and the pieces in which it came."""

    first: float
    last: float
    pieces: int


def serve_upstream(pipe: Connection) -> None:
    """Run the upstream in a process of its own, so that it shares no interpreter with the load."""
    with ReplayUpstream() as upstream:
        upstream.scripts["paced"] = Script.recorded("text-stream", delay=0.02)
        pipe.send(upstream.url)
        pipe.recv()


@contextmanager
def upstream_process() -> Iterator[str]:
    """The upstream's URL."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve_upstream, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join(10)


async def ask(session: aiohttp.ClientSession, side: Side, messages: list[dict[str, str]], stream: bool) -> Timing:
    body = {"model": "metaclaw/alpha", "messages": messages, "stream": stream}
    headers = {"authorization": f"Bearer {side.key}"}
    first, pieces, started = 0.0, 0, time.perf_counter()
    async with session.post(f"{side.url}/v1/chat/completions", json=body, headers=headers) as response:
        async for data, _ in response.content.iter_chunks():
            first = first or time.perf_counter()
            pieces += bool(data)  # the end of a piece may come by itself
        if response.status != 200:
            raise SystemExit(f"{side.name} answered {response.status}")
    return Timing(first - started, time.perf_counter() - started, pieces)


def said(text: str, case: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{text} case:{case}"}]


async def alone(sides: list[Side], rounds: int, case: str, text: str) -> dict[str, list[Timing]]:
    """One request at a time, each side in turn."""
    found: dict[str, list[Timing]] = {side.name: [] for side in sides}
    async with aiohttp.ClientSession() as session:
        for number in range(rounds):
            for side in sides:
                messages = said(f"{number} {text}", case)
                found[side.name].append(await ask(session, side, messages, case == "paced"))
    return found


async def together(side: Side, concurrency: int, seconds: float) -> tuple[float, float]:
    """Requests per second of ``concurrency`` clients, and milliseconds of processor time to a request."""
    process = side.process()
    done, started, busy = 0, time.perf_counter(), processor_seconds(process)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:

        async def client(number: int) -> None:
            nonlocal done
            while time.perf_counter() < started + seconds:
                await ask(session, side, said(f"client {number}, request {done}", "text-whole"), stream=False)
                done += 1

        await asyncio.gather(*(client(number) for number in range(concurrency)))
    return done / (time.perf_counter() - started), (processor_seconds(process) - busy) / done * MS


def processor_seconds(process: psutil.Process | None) -> float:
    if process is None:
        return 0.0
    times = process.cpu_times()
    return float(times.user + times.system)


async def speed(sides: list[Side], quick: bool) -> dict[str, dict[str, float]]:
    """Latency alone and throughput together, side -> measure -> value."""
    await alone(sides, 20, "text-whole", "warm up")
    rounds, seconds, turns = (40, 2.0, 2) if quick else (150, 4.0, 5)
    whole = await alone(sides, rounds, "text-whole", "How do I word a commit message?")
    paced = await alone(sides, rounds // 2, "paced", "How do I word a commit message?")
    rates: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for concurrency in (16, 64):
        for _ in range(turns):
            for side in sides:
                rates.setdefault((side.name, concurrency), []).append(await together(side, concurrency, seconds))
    return {
        side.name: {
            "p50, ms": statistics.median(t.last for t in whole[side.name]) * MS,
            "first token, ms": statistics.median(t.first for t in paced[side.name]) * MS,
            "pieces of a stream": statistics.median(t.pieces for t in paced[side.name]),
        }
        | {f"requests/s, {n} clients": statistics.median(r for r, _ in rates[side.name, n]) for n in (16, 64)}
        | {
            f"processor, ms/request, {n} clients": statistics.median(c for _, c in rates[side.name, n])
            for n in (16, 64)
        }
        for side in sides
    }


async def long(sides: list[Side], gateway: GatewayServer, quick: bool) -> dict[str, Any]:
    """A prompt of 200,000 characters alone, and what a conversation that begins with one takes in the store."""
    timings = await alone(sides, 5 if quick else 30, "text-whole", LONG)
    messages = said(LONG, "text-whole")
    sizes = []
    async with aiohttp.ClientSession() as session:
        for turn in range(TURNS):
            await ask(session, sides[0], messages, stream=False)
            sizes.append(newest_size(gateway))
            messages += [{"role": "assistant", "content": " Analysisura kit"}, *said(f"turn {turn}", "text-whole")]
    milliseconds = {name: statistics.median(t.last for t in found) * MS for name, found in timings.items()}
    return {"p50, ms": milliseconds, "stored bytes by turn": sizes}


def newest_size(gateway: GatewayServer) -> int:
    with sqlite3.connect(gateway.settings.home / "metaclaw.db") as store:
        return int(store.execute("SELECT size FROM traces ORDER BY seq DESC LIMIT 1").fetchone()[0])


async def memory(side: Side, sessions: int) -> dict[int, float]:
    """Resident set in MB after so many sessions of one turn."""
    process, marks = side.process(), {}
    assert process is not None
    gate = asyncio.Semaphore(16)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=16)) as session:

        async def one(number: int) -> None:
            async with gate:
                await ask(session, side, said(f"session {number}", "text-whole"), stream=False)

        step = sessions // 10
        for begun in range(0, sessions, step):
            await asyncio.gather(*(one(number) for number in range(begun, begun + step)))
            marks[begun + step] = process.memory_info().rss / 2**20
            print(f"{begun + step} sessions: {marks[begun + step]:.0f} MB", flush=True)
    return marks


def show_speed(table: dict[str, dict[str, float]]) -> None:
    print("| | " + " | ".join(table) + " | ours / plain |")
    print("|---|" + "---|" * (len(table) + 1))
    for name in table["ours"]:
        values = [side[name] for side in table.values()]
        print(f"| {name} | " + " | ".join(f"{v:.1f}" for v in values) + f" | {values[0] / values[1]:.2f} |")


async def measure(parts: list[str], sides: list[Side], gateway: GatewayServer, quick: bool) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if "speed" in parts:
        result["speed"] = await speed(sides, quick)
        show_speed(result["speed"])
    if "long" in parts:
        result["long"] = await long(sides, gateway, quick)
        print(json.dumps(result["long"]))
    if "memory" in parts:
        result["memory"] = await memory(sides[0], 1000 if quick else 10_000)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="measure this alone; may be repeated")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    parts = options.part or list(PARTS)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = stack.enter_context(upstream_process())
        gateway = stack.enter_context(running_gateway(folder / "ours", upstream, pick_free_port()))
        sides = [Side("ours", gateway.url, gateway.key)]
        if parts != ["memory"]:
            plain = stack.enter_context(running_plain_litellm(folder / "plain", upstream, pick_free_port()))
            sides += [Side("plain", plain, PLAIN_KEY), Side("direct", upstream, "none")]
        result = asyncio.run(measure(parts, sides, gateway, options.quick))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
