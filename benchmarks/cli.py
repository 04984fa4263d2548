"""How long the command line takes: ``python -m benchmarks.cli [--json FILE]``.

Medians of runs that take turns, beside a bare Python, on a store with many traces and no process running.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import sqlalchemy as sa

from metaclaw_plugin.store import schema
from metaclaw_plugin.store.engine import open_store

RUNS = 15
TRACES = 20_000
BODY = b"x" * 4000  # about what a compressed chat turn takes


def fill(home: Path) -> None:
    """A store with two agents and ``TRACES`` traces."""
    engine = open_store(f"sqlite:///{home / 'metaclaw.db'}")
    given = {"request_id": "r", "session": "s", "turn": 0, "exchange": 0, "kind": "main", "route": "chat", "model": "m"}
    given |= {"adapter_version": 0, "skill_generation": 0, "started_at": 1.0, "finished_at": 2.0, "trainable": True}
    given |= {"size": len(BODY), "body": BODY, "score": "scored", "forward": "trained", "purpose": "query"}
    with engine.begin() as c:
        for name in ("plain", "formal"):
            c.execute(sa.insert(schema.agents).values(name=name, settings={}, created_at=1.0))
        for start in range(0, TRACES, 1000):
            rows = [{**given, "id": f"t{n}", "agent": ("plain", "formal")[n % 2]} for n in range(start, start + 1000)]
            c.execute(sa.insert(schema.traces), rows)
    engine.dispose()


def seconds(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Wall and processor time of one run; the latter says more on a machine that has other things to do."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = code
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    metaclaw = str(Path(sys.executable).with_name("metaclaw"))
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "metaclaw --help": [metaclaw, "--help"],
        "metaclaw status": [metaclaw, "status"],
        "metaclaw status --json": [metaclaw, "status", "--json"],
    }
    with tempfile.TemporaryDirectory() as home:
        fill(Path(home))
        env = {**os.environ, "METACLAW_HOME": home}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(RUNS):
            for name, command in commands.items():
                taken[name].append(seconds(command, env))
    print("| command | wall, median s | wall, slowest s | processor, median s |\n|---|---|---|---|")
    for name, runs in taken.items():
        walls, works = zip(*runs, strict=True)
        medians = f"{statistics.median(walls):.3f} | {max(walls):.3f} | {statistics.median(works):.3f}"
        print(f"| `{name}` | {medians} |")
    if options.json:
        options.json.write_text(json.dumps({"traces": TRACES, "seconds": taken}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
