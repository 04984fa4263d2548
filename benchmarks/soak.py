"""The whole system under the highest load that it sustains: latency over time, memory of each process, queues, errors.

    python -m benchmarks.soak [--minutes 30] [--start 10] [--share 0.95] [--json FILE]
    python -m benchmarks.soak --streams 512 [--minutes 5] [--stream-seconds 30]

Gateway, worker and trainer are real, with the tiny model; the upstream is wire-true and costs little. Requests begin on
a schedule, however long the answers before them take; latency counts from the time a request was due. First the
rate is raised from phase to phase until a queue (under way, unscored, unforwarded, untrained) grows or answers come
late; then ``share`` of the last rate that held is asked for, for so long: a short phase does not see a queue that grows
by less than 2 % of the rate. Two turns make a conversation, and all of it is trained.

With ``--streams`` there is one gateway process, and so many streams are open at once; first they go to the upstream
itself, which says what that load is without us. Both ask for the same fields, log-probabilities and token ids included.

It ends with 1, and a line for each reason, when a request failed or could not be begun, a trace was lost, or a queue or
the memory of a process grew beyond a bound (``--queue-growth``, ``--memory-growth``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.soak_load import AtOnce, Load, OpenLoop, Target
from benchmarks.soak_report import BARE, Bounds, errors, failures, show
from benchmarks.soak_search import search
from benchmarks.soak_watch import WARM, Row, Watch, latency, not_stored, settled, slopes, until_idle
from demo.models import model_path
from tests.faults.stage import Stage, standing
from tests.faults.upstream import BASE

LOOK = 10.0  # seconds between two rows
SETTLE = 180.0  # seconds at the end for what waits
PIECES = 6  # of a stream of the upstream, or one more; it waits before each
# What the gateway asks the upstream for.
RICH = {"logprobs": True, "return_token_ids": True, "stream_options": {"include_usage": True}}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the tables, write the JSON; 0 if the system stood it."""
    given = _parser().parse_args(arguments)
    found = asyncio.run(streams(given) if given.streams else soak(given))
    found["failures"] = failures(found, Bounds(given.queue_growth, given.memory_growth))
    show(found)
    target = given.json or Path("runs/benchmarks") / ("streams.json" if given.streams else "soak.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in found["failures"]:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if found["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="for which the rate, or the streams, are held")
    parser.add_argument("--start", type=float, default=10.0, help="requests a second of the first phase of the search")
    parser.add_argument("--phase", type=float, default=60.0, help="seconds of one phase of the search")
    parser.add_argument("--slow", type=float, default=2.0, help="seconds: a rate with a longer p95 is not held")
    parser.add_argument("--share", type=float, default=0.95, help="of the highest rate that held, that is asked for")
    parser.add_argument("--in-flight", type=int, default=256, help="requests under way at the most")
    parser.add_argument("--streams", type=int, default=0, help="so many streams at once, on one gateway process")
    parser.add_argument("--stream-seconds", type=float, default=30.0, help="that the upstream takes for one of them")
    parser.add_argument("--queue-growth", type=float, default=100.0, help="items by which a queue may grow")
    parser.add_argument("--memory-growth", type=float, default=100.0, help="MiB by which a process may grow")
    parser.add_argument("--json", type=Path)
    return parser


async def soak(given: argparse.Namespace) -> dict[str, Any]:
    """Find the highest rate that holds, then rows of figures while it is asked for."""
    with tempfile.TemporaryDirectory(prefix="metaclaw-soak-") as folder:
        async with standing(Path(folder), model_path("tiny"), breakable=False) as stage:
            stopped = stop_signals()
            target = Target(stage.url, stage.keys)

            def make(rate: float, name: str) -> OpenLoop:
                return OpenLoop(target, rate, name, limit=given.in_flight)

            await Watch(stage, warm := make(given.start, "warm")).rows(LOOK, LOOK, stopped, shown=False)
            found = await search(stage, make, given.start, given.phase, given.slow, stopped)
            head = {**about(stage), "held": found.held, "limit": found.limit, "phases": found.phases}
            if found.held is None or stopped.is_set():
                return {**head, "warm": latency(warm.replies)}
            load = make(found.held * given.share, "held")
            rows = await Watch(stage, load).rows(given.minutes * 60, LOOK, stopped, shown=True)
            return {**head, "rate": load.rate, **await ended(stage, load, rows)}


async def streams(given: argparse.Namespace) -> dict[str, Any]:
    """So many streams at once: to the upstream itself for three of their lengths, then through one gateway process."""
    pause = given.stream_seconds / PIECES
    with tempfile.TemporaryDirectory(prefix="metaclaw-soak-") as folder:
        async with standing(Path(folder), model_path("tiny"), workers=1, breakable=False, pause=pause) as stage:
            stopped = stop_signals()
            upstream = Target(f"http://127.0.0.1:{stage.vllm_port}", stage.keys, BASE, RICH)
            bare = AtOnce(upstream, given.streams, "bare", ramp=given.stream_seconds)
            bare_rows = await Watch(stage, bare).rows(3 * given.stream_seconds, LOOK, stopped, shown=True)
            ours = AtOnce(Target(stage.url, stage.keys), given.streams, "ours", ramp=given.stream_seconds)
            rows = await Watch(stage, ours).rows(given.minutes * 60, LOOK, stopped, shown=True)
            sides = {BARE: side(bare, bare_rows), "through the gateway": side(ours, rows)}
            return {
                **about(stage),
                "streams": given.streams,
                "stream_seconds": given.stream_seconds,
                "sides": sides,
                **await ended(stage, ours, rows),
            }


def side(load: AtOnce, rows: Sequence[Row]) -> dict[str, Any]:
    """How the streams of one side went; those that ended while it was looked at count for the pace, after the ramp."""
    full = settled(rows, load.ramp)
    seconds = sum(row["seconds"] for row in full)
    pace = sum(row["requests"] for row in full) / seconds if seconds else 0.0
    return {**latency(load.replies), "ended_per_second": pace, "errors": errors(load.replies)}


async def ended(stage: Stage, load: Load, rows: list[Row]) -> dict[str, Any]:
    """What all rows together say, once what waits is done."""
    late = settled(rows, WARM)
    return {
        "all": latency(load.replies),
        "errors": errors(load.replies),
        "skipped": load.skipped,
        "late": load.late,
        "rows": rows,
        "slopes": slopes(late if len(late) >= 3 else rows),
        "idle_after": await until_idle(stage, SETTLE, asyncio.Event()),
        "not_stored": not_stored(stage, load.replies),
        "without_trace": sum(one.whole and not one.trace for one in load.replies),
        "counted": await stage.counted(),
    }


def about(stage: Stage) -> Mapping[str, Any]:
    return {
        "machine": f"{os.cpu_count()}-core {os.uname().machine}, no GPU",
        "gateway_processes": stage.settings.gateway.workers,
    }


def stop_signals() -> asyncio.Event:
    """Set by Ctrl-C or SIGTERM: what was seen until then is printed all the same."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


if __name__ == "__main__":
    sys.exit(main())
