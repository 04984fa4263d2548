"""Figures of benchmarks.publish, for files and for people."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.publish_streams import Tally


def report(
    phases: Mapping[str, Tally], waits: Mapping[str, Sequence[float]], sizes: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """Figures as JSON. ``waits``: seconds by what was waited for; ``sizes``: MiB by part, along the publishes."""
    failed = [line for tally in phases.values() for line in tally.failed]
    wrong = [line for tally in phases.values() for line in tally.wrong]
    spreads = {name: spread(values) for name, values in waits.items()}
    limit = max(phases["without"].gaps) + max(waits["vllm_load"])
    return {
        "publishes": len(waits["publish"]),
        "replies": {name: tally.replies for name, tally in phases.items()},
        "failed_count": len(failed),
        "failed": failed[:20],
        "wrong_count": len(wrong),
        "wrong": wrong[:20],
        **spreads,
        **{f"gap_{name}": spread(tally.gaps) for name, tally in phases.items()},
        **{f"last_chunk_{name}": spread(tally.ends) for name, tally in phases.items()},
        **{f"first_word_{name}": spread(tally.first) for name, tally in phases.items()},
        **{f"direct_{name}": spread(tally.direct) for name, tally in phases.items()},
        **{f"late_{name}": spread(tally.late) for name, tally in phases.items()},
        "stall_limit": round(limit, 4),  # one normal gap and one load by vLLM alone, the longest of each
        "stalls": {name: sum(gap > limit for gap in tally.gaps) for name, tally in phases.items()},
        "longest": {name: _longest(tally) for name, tally in phases.items()},
        "moments_over_a_second_per_minute": {name: _moments(tally) for name, tally in phases.items()},
        "gaps": {name: len(tally.gaps) for name, tally in phases.items()},
        "memory_mib": [{part: round(size, 1) for part, size in one.items()} for one in sizes],
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
    }


def _longest(tally: Tally) -> list[dict[str, float | str]]:
    """The ten longest gaps: seconds, when they ended (seconds after the phase's first), in whose reply."""
    worst = sorted(zip(tally.gaps, tally.at, strict=True), reverse=True)[:10]
    return [{"gap": round(gap, 3), "at": round(at - tally.at[0][0], 2), "in": version} for gap, (at, version) in worst]


def _moments(tally: Tally) -> dict[str, float]:
    """Moments a minute at which something waited for more than a second; gaps that end within a second are one."""
    ends = sorted(at for gap, (at, _) in zip(tally.gaps, tally.at, strict=True) if gap > 1.0)
    moments = sum(1 for before, after in itertools.pairwise([float("-inf"), *ends]) if after - before > 1.0)
    late = sum(value > 1.0 for value in tally.late)
    direct = sum(value > 1.0 for value in tally.direct)
    return {
        name: round(60 * count / tally.seconds, 2)
        for name, count in (("streams", moments), ("direct", direct), ("clock", late))
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th and 99.9th percentile and maximum, in seconds."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)

    return {"median": round(statistics.median(ordered), 4), "p99": at(0.99), "p99.9": at(0.999), "max": at(1.0)}


def print_table(found: dict[str, Any]) -> None:
    """The report for people."""
    for name, row in found.items():
        if isinstance(row, dict) and "median" in row:
            print(f"{name:<24}" + "".join(f"{key} {value:8.3f} s   " for key, value in row.items()))
    print(f"replies {found['replies']}, failed {found['failed_count']}, by a wrong version {found['wrong_count']}")
    print(f"gaps above {found['stall_limit']:.3f} s: {found['stalls']} of {found['gaps']}")
    print(f"waits of more than a second, a minute: {found['moments_over_a_second_per_minute']}")
    sizes = found["memory_mib"]
    for number in sorted({0, len(sizes) // 4, len(sizes) // 2, 3 * len(sizes) // 4, len(sizes) - 1}):
        row = "".join(f"{part} {size:7.1f}   " for part, size in sorted(sizes[number].items()))
        print(f"MiB after {100 * number // max(1, len(sizes) - 1):3d} % of the publishes   {row}")
    print(f"adapters loaded at the end: {found['loaded_at_the_end']}")
