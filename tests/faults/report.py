"""What a siege found, as tables and as JSON."""

from __future__ import annotations

import os
import statistics
from typing import Any

from tests.faults.excuses import Failures
from tests.faults.siege import Siege


def result_of(siege: Siege, failures: Failures, *, seed: int, started: float, seconds: float) -> dict[str, Any]:
    """Everything that is printed, as JSON."""
    durations = sorted(one.ended - one.began for one in siege.clients.asked if one.whole)
    return {
        "machine": f"{os.cpu_count()}-core {os.uname().machine}, no GPU",
        "seed": seed,
        "seconds": round(seconds),
        "start_seconds": round(started, 1),
        "real_vllm": siege.stage.real_vllm,
        "kills": dict(sorted(siege.killer.kills.items())),
        "at_points": dict(sorted(siege.killer.at_points.items())),
        "faults": [vars(row) for row in siege.rows],
        "requests": len(siege.clients.asked),
        "whole": len(durations),
        "request_p50": statistics.median(durations) if durations else None,
        "request_p99": durations[int(len(durations) * 0.99)] if durations else None,
        "failed_by": {f"{why}: {kind}": n for (why, kind), n in sorted(failures.by_cause.items())},
        "failures": failures.each,
        "missing_and_counted": len(siege.forgiven) + siege.unrecorded,
        "slowest_return": max(siege.backs, default=0.0),
        **siege.findings.summary(),
        "clean": siege.findings.clean,
    }


def print_tables(result: dict[str, Any]) -> None:
    kills = result["kills"]
    print(f"\nseed {result['seed']}, {result['seconds']} s, {result['machine']}")
    print("\n| killed | SIGKILL | SIGTERM |\n|---|---|---|")
    for name in sorted({entry.split()[0] for entry in kills}):
        print(f"| {name} | {kills.get(f'{name} SIGKILL', 0)} | {kills.get(f'{name} SIGTERM', 0)} |")
    at = result["at_points"]
    print(f"\nof these at {len(at)} named points: " + ", ".join(f"{name} {n}" for name, n in at.items()))
    if result["faults"]:
        print("\n| fault | may cost | s | touched | requests | failed meanwhile | missing | counted | back after, s |")
        print("|---|---|---|---|---|---|---|---|---|")
        for row in result["faults"]:
            counted = ", ".join(f"{name} {n}" for name, n in row["counted"].items() if n)
            print(f"| {row['name']} | {row['cost']} | {row['seconds']:.1f} | {row['touched']} | {row['requests']} | "
                  f"{row['failed']} | {row['missing']} | {counted} | {row['back']:.1f} |")  # fmt: skip
    print("\n| found | |\n|---|---|")
    for name, value in {
        "requests": result["requests"],
        "answers received whole": result["whole"],
        **result["seen"],
        **{f"requests failed: {why}": n for why, n in result["failed_by"].items()},
        "answers not stored, each counted": result["missing_and_counted"],
        "slowest return of service, s": f"{result['slowest_return']:.1f}",
        "p50 / p99 of an answer, s": f"{result['request_p50']:.2f} / {result['request_p99']:.2f}",
        **{f"**{kind}**": n for kind, n in result["wrong"].items()},
    }.items():
        print(f"| {name} | {value} |")
    for kind, texts in result.get("examples", {}).items():
        for text in texts[:8]:
            print(f"{kind}: {text}")
