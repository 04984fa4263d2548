"""What sessions cost: memory over 10,000 of them, and the time of the store's part of one request.

    python -m benchmarks.sessions [--sessions 10000] [--url sqlite:///... | postgresql://...]

Each session has two turns that only the conversation itself tells apart: resolve, store the trace, extend the chain, as
a gateway process does it. Memory is the process's resident set after a collection. Writes
runs/benchmarks/sessions.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from metaclaw_plugin.gateway import sessions
from metaclaw_plugin.gateway.sessions import RequestEvidence
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.codec import encode_trace
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.traces import insert_traces
from tests.store_cases import TRACE

TURNS = 2
PROMPT = tuple(range(500))
ANSWER = tuple(range(100))


def main() -> None:
    """Run, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--url", help="store to use; unset: SQLite in a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.url or f"sqlite:///{folder}/metaclaw.db", given.sessions)
    target = Path(__file__).resolve().parents[1] / "runs" / "benchmarks" / "sessions.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| sessions | resident set, MB | resolve, ms (p50) | store and extend, ms (p50) |")
    print("|---|---|---|---|")
    for row in found["rows"]:
        print(f"| {row['sessions']} | {row['rss_mb']:.1f} | {row['resolve_ms']:.2f} | {row['commit_ms']:.2f} |")
    print(f"growth after the first thousand: {found['growth_mb']:.1f} MB")


def run(url: str, count: int) -> dict[str, Any]:
    """Figures after every thousand sessions."""
    engine = open_store(url)
    settings = Settings()
    with engine.begin() as c:
        add_agent(c, "alpha")
    rows = []
    resolving: list[float] = []
    committing: list[float] = []
    for number in range(count):
        messages: list[dict[str, str]] = []
        for turn in range(TURNS):
            messages.append({"role": "user", "content": f"question {turn} of conversation {number}"})
            before = time.perf_counter()
            heard = sessions.hear(RequestEvidence({}, {"messages": messages}), settings)
            with engine.begin() as c:
                place = sessions.resolve(c, "alpha", heard, time.time(), settings)
            resolved = time.perf_counter()
            answer = {"role": "assistant", "content": f"answer {turn} of conversation {number}"}
            trace = dataclasses.replace(
                TRACE,
                id=f"tr-{number}-{turn}",
                session=place.session,
                turn=place.turn,
                messages=tuple(messages),
                response=answer,
                prompt_token_ids=PROMPT,
                response_token_ids=ANSWER,
                response_logprobs=tuple(-0.1 for _ in ANSWER),
            )
            row = encode_trace(trace)
            with engine.begin() as c:
                insert_traces(c, [row])
                sessions.settle(c, place, [answer], time.time(), None)
            resolving.append(resolved - before)
            committing.append(time.perf_counter() - resolved)
            messages.append(answer)
            assert place.turn == turn
        if (number + 1) % 1000 == 0:
            gc.collect()
            rows.append(
                {
                    "sessions": number + 1,
                    "rss_mb": psutil.Process().memory_info().rss / 1e6,
                    "resolve_ms": statistics.median(resolving) * 1e3,
                    "commit_ms": statistics.median(committing) * 1e3,
                }
            )
            resolving.clear()
            committing.clear()
    engine.dispose()
    return {"url": engine.dialect.name, "rows": rows, "growth_mb": rows[-1]["rss_mb"] - rows[0]["rss_mb"]}


if __name__ == "__main__":
    main()
