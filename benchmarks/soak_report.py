"""Figures of benchmarks.soak for people, and whether the system stood it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.soak_load import Reply
from benchmarks.soak_watch import Row

LOST = ("traces_lost", "requests_unrecorded")  # what the gateway counts
ITSELF = "this program"  # it remembers every answer
BARE = "the upstream alone"  # one side of the streams
LINES = 15  # of a table, at most


@dataclass(frozen=True)
class Bounds:
    """What a run may do: ``growth`` of a queue (items) and of a process (MiB), both after the first minute."""

    queue: float
    memory: float


def errors(replies: Sequence[Reply]) -> dict[str, int]:
    """How often each error was seen."""
    return dict(Counter(one.error[:80] for one in replies if not one.whole))


def failures(found: Mapping[str, Any], bounds: Bounds) -> list[str]:
    """Why the run is not what it has to be; nothing if it is."""
    if not found.get("rows"):
        return [f"no load was held for long: {found.get('limit', 'it was stopped before')}"]
    every, grew = found["all"], found["slopes"]
    lines = [f"{every['failed']} of {every['requests']} requests failed: {found['errors']}"] if every["failed"] else []
    bare = found.get("sides", {}).get(BARE)
    lines += [f"{bare['failed']} streams of {BARE} failed: {bare['errors']}"] if bare and bare["failed"] else []
    if not every["requests"]:
        lines.append("no request was answered")
    if found["skipped"]:
        lines.append(f"{found['skipped']} requests were not begun when their time had come: too many were under way")
    if found["not_stored"]:
        lines.append(f"{found['not_stored']} traces were lost: the answer came whole, and the store does not hold them")
    if found["without_trace"]:
        lines.append(f"{found['without_trace']} answers came without the id of a trace")
    lines += [f"the gateway counts {found['counted'][name]} {name}" for name in LOST if found["counted"].get(name)]
    for name, more in grew["queues_grew"].items():
        if more > bounds.queue:
            lines.append(
                f"{name} grew by {more:.0f} ({grew['queues_per_second'][name]:.2f}/s), more than {bounds.queue:g}"
            )
    for name, more in grew["mib_grew"].items():
        if more > bounds.memory and name != ITSELF:
            pace = f"{grew['mib_per_minute'][name]:.2f} a minute"
            lines.append(f"the memory of {name} grew by {more:.0f} MiB ({pace}), more than {bounds.memory:g}")
    lines += [f"{name} was started again while it went on" for name in restarted(found["rows"])]
    if found["idle_after"] is None:
        lines.append("what waited was not scored, forwarded and trained in the time given at the end")
    return lines


def restarted(rows: Sequence[Row]) -> list[str]:
    """Processes that were not the same one from the first row to the last."""
    names = {name for row in rows for name in row["pids"]}
    return sorted(name for name in names if len({row["pids"].get(name) for row in rows}) > 1)


def show(found: Mapping[str, Any]) -> None:
    """The search, the sides of the streams, and one line for each of some stretches of the run."""
    print(f"\n{found['machine']}; {found['gateway_processes']} gateway process(es)")
    if "held" in found:
        held = "none" if found["held"] is None else f"{found['held']:.1f} requests/s"
        print(f"highest rate that was held: {held}; against the next: {found['limit']}")
    for name, side in found.get("sides", {}).items():
        print(f"{name}: {side['ended_per_second']:.1f} streams/s")
        _print_all(side)
    rows = found.get("rows", [])
    if rows:
        table(rows)
        _print_all(found["all"])
        print(f"{found['skipped']} not begun, {found['late']} begun late")
        for name, values in found["slopes"].items():
            print(f"{name}: {values}")
        print(f"idle {found['idle_after']} s after the last answer; counted {found['counted']}")


def _print_all(every: Mapping[str, Any]) -> None:
    print(f"  {every['requests']} requests, {every['failed']} failed")
    for name in ("first", "took"):
        cuts = ", ".join(f"{cut} {value:.2f}" for cut, value in every[name].items())
        print(f"  {'first chunk' if name == 'first' else 'whole'}, s: {cuts or 'none'}")


def table(rows: Sequence[Row]) -> None:
    """Median of the cuts, sum of the counts, and the last of what is a level, for each stretch."""
    names, users = [name for name in rows[0]["memory"] if name != ITSELF], list(rows[0]["cores"])
    heads = ["minute", "requests/s", "open", "first chunk p95, s", "p50, s", "p95, s", "p99, s", "failed", "not begun"]
    heads += [*(f"{name}, MiB" for name in names), *(f"{name}, cores" for name in users)]
    heads += [*rows[0]["waits"], "versions", "store, MiB"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    step = max(1, -(-len(rows) // LINES))
    for part in (rows[first : first + step] for first in range(0, len(rows), step)):
        last, seconds = part[-1], sum(row["seconds"] for row in part)
        cells: list[object] = [
            f"{last['at'] / 60:.1f}",
            f"{sum(row['requests'] for row in part) / seconds:.1f}",
            last["open"],
        ]
        for what, cut in (("first", "p95"), ("took", "p50"), ("took", "p95"), ("took", "p99")):
            values = [row[what][cut] for row in part if row[what]]
            cells.append(f"{statistics.median(values):.2f}" if values else "-")
        cells += [sum(row["failed"] for row in part), sum(row["skipped"] for row in part)]
        cells += [f"{last['memory'].get(name, 0):.0f}" for name in names]
        cells += [f"{statistics.fmean(row['cores'].get(name, 0) for row in part):.2f}" for name in users]
        cells += [*last["waits"].values(), last["versions"], last["sizes"]["store"]]
        print("| " + " | ".join(map(str, cells)) + " |")
