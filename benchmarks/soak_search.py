"""The highest rate that the whole system holds: raised from phase to phase until a queue grows or answers come late."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.soak_load import OpenLoop
from benchmarks.soak_watch import Row, Watch, latency, settled, slopes, until_idle
from tests.faults.stage import Stage

STEP = 1.15  # from one rate to the next
GROWS = 0.02  # of the rate: a queue that grows faster is not held
AT_LEAST = 12.0  # items by which it must have grown, since every queue comes and goes by some
LOOK = 2.0  # seconds between two looks
REST = 300.0  # seconds for the queues to empty after a phase that was not held
TRIES = 2  # a rate is not held when so many phases of it in a row say so


@dataclass(frozen=True)
class Found:
    """``held``: the highest rate that held, None if not even the first did; ``limit``: what stood against the next."""

    held: float | None
    limit: str
    phases: list[dict[str, Any]]


async def search(
    stage: Stage,
    make: Callable[[float, str], OpenLoop],
    start: float,
    seconds: float,
    slow: float,
    stopped: asyncio.Event,
) -> Found:
    """Raise the rate by STEP from ``start`` until TRIES phases of it in a row are not held."""
    phases: list[dict[str, Any]] = []
    held: float | None = None
    rate, tries = start, 0
    while not stopped.is_set():
        load = make(rate, f"phase-{len(phases)}")
        rows = await Watch(stage, load).rows(seconds, LOOK, stopped, shown=False)
        if stopped.is_set():
            break
        phase = judged(rows, load, seconds, slow)
        phases.append(phase)
        print(told(phase), flush=True)
        if not phase["trouble"]:
            held, tries, rate = rate, 0, rate * STEP
            continue
        if await until_idle(stage, REST, stopped) is None:
            return Found(held, f"{told(phase)}; the queues were not empty {REST:.0f} s later", phases)
        tries += 1
        if tries == TRIES:
            return Found(held, told(phase), phases)
    return Found(held, "the search was stopped", phases)


def judged(rows: Sequence[Row], load: OpenLoop, seconds: float, slow: float) -> dict[str, Any]:
    """Figures of one phase; ``trouble`` says why it was not held. Its first third is for the change of the rate."""
    late = settled(rows, seconds / 3)
    found, whole = slopes(late), latency(load.replies)
    trouble = [
        f"{name} grew by {found['queues_per_second'][name]:.2f}/s"
        for name, grew in found["queues_grew"].items()
        if grew > AT_LEAST and found["queues_per_second"][name] > GROWS * load.rate
    ]
    if whole["took"].get("p95", 0.0) > slow:
        trouble.append(f"p95 was {whole['took']['p95']:.2f} s (more than {slow:g} s)")
    trouble += [f"{load.skipped} requests could not be begun, {load.limit} were under way"] if load.skipped else []
    trouble += [f"{whole['failed']} requests failed"] if whole["failed"] else []
    cores = {
        name: round(statistics.fmean(row["cores"].get(name, 0.0) for row in late), 2) for name in late[-1]["cores"]
    }
    return {"rate": round(load.rate, 2), **whole, **found, "late": load.late, "cores": cores, "trouble": trouble}


def told(phase: dict[str, Any]) -> str:
    """One line about a phase."""
    busy = ", ".join(f"{name} {cores:.2f}" for name, cores in sorted(phase["cores"].items(), key=lambda one: -one[1]))
    state = "held" if not phase["trouble"] else "not held: " + "; ".join(phase["trouble"])
    return f"{phase['rate']:.1f} requests/s, p95 {phase['took'].get('p95', 0.0):.2f} s, {state} (cores: {busy})"
