"""How long the console's pages take, and whether that grows with the store: ``python -m benchmarks.console``.

The same 50 agents with 2,000 and with 100,000 traces; one agent has half of them. The console runs as it does under
``metaclaw start``, on one core; each page is asked for again and again, by HTTP, signed in.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from metaclaw_plugin.skills.skill_file import render_skill
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.agents import add_agent
from metaclaw_plugin.store.codec import encode_trace
from metaclaw_plugin.store.engine import open_store
from tests.store_cases import a_trace

ROOT = Path(__file__).resolve().parent.parent
SIZES = (2_000, 100_000)
AGENTS = 50
TURNS = 8  # of a session
VERSIONS = 60  # of each agent
SKILLS = 300
KEY = "console-key-of-the-benchmark"
BUSY = "agent-00"  # has half of all traces


def fill(home: Path, traces: int) -> None:
    """A store of that many traces, nine tenths of them rewarded, and a library."""
    engine = open_store(f"sqlite:///{home / 'metaclaw.db'}")
    answer = {"role": "assistant", "content": "It depends on what is asked, and on who asks. " * 12}
    question = ({"role": "system", "content": "You are terse. " * 60}, {"role": "user", "content": "Why? " * 80})
    tokens: dict[str, Any] = {
        "prompt_token_ids": tuple(range(400)),
        "response_token_ids": tuple(range(150)),
        "response_logprobs": (-0.3,) * 150,
    }
    row = dict(encode_trace(a_trace(messages=question, response=answer, **tokens)))
    start = time.time() - 90 * 86_400
    step = 90 * 86_400 / traces
    with engine.begin() as c:
        for number in range(AGENTS):
            add_agent(c, f"agent-{number:02d}")
        c.execute(schema.skill_ledger.insert(), list(_ledger()))
        c.execute(schema.adapters.insert(), list(_versions(start)))
        c.execute(
            schema.routes.insert(), [{"agent": name, "version": VERSIONS, "changed_at": start} for name in _names()]
        )
    batch: list[dict[str, Any]] = []
    for number in range(traces):
        place = number // TURNS
        agent = BUSY if place % 2 else f"agent-{1 + place // 2 % (AGENTS - 1):02d}"
        at = start + number * step
        rewarded = number % 10 != 0
        batch.append(
            row
            | {
                "id": f"tr-{number}",
                "agent": agent,
                "session": f"ses-{place}",
                "turn": number % TURNS,
                "response_id": f"r-{number}",
                "started_at": at,
                "finished_at": at + 1,
                "score": "scored" if rewarded else "unscored",
                "reward": (number % 19 - 9) / 9 if rewarded else None,
                "forward": "trained" if rewarded else "skipped",
                "purpose": "query",
                "adapter_version": number * VERSIONS // traces,
            }
        )
        if len(batch) == 5_000 or number == traces - 1:
            with engine.begin() as c:
                c.execute(schema.traces.insert(), batch)
                c.execute(schema.sessions.insert(), list(_sessions(batch)))
                c.execute(schema.rewards.insert(), list(_rewards(batch)))
            batch = []
    engine.dispose()
    for number in range(SKILLS):
        folder = home / "skills" / "_shared" / f"skill-{number}"
        folder.mkdir(parents=True)
        text = render_skill(f"skill-{number}", f"Use when asked about matter {number}.", "Do it step by step. " * 20)
        (folder / "SKILL.md").write_bytes(text)


def _names() -> list[str]:
    return [f"agent-{number:02d}" for number in range(AGENTS)]


def _sessions(batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in batch:
        if row["turn"] == 0:
            yield {
                "id": row["session"],
                "agent": row["agent"],
                "evidence": "x-session-id",
                "evidence_key": row["session"],
                "started_at": row["started_at"],
                "last_at": row["finished_at"],
                "closed_at": row["finished_at"] + 60,
                "close_reason": "idle",
                "held_out": False,
                "without_skills": [],
            }


def _rewards(batch: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in batch:
        if row["reward"] is not None:
            given = {"value": row["reward"], "confidence": 1.0, "rationale": "It answers the question.", "at": 1.0}
            yield {"trace_id": row["id"], "source": "judge", **given}


def _versions(start: float) -> Iterator[dict[str, Any]]:
    figures = {"loss": 0.1, "kl_base": 0.2, "gap": 1e-5, "entropy": 2.0, "tokens_per_second": 90.0, "reward": 0.3}
    for name in _names():
        for number in range(1, VERSIONS + 1):
            at = start + number * 86_400.0
            manifest = {
                "agent": name,
                "number": number,
                "base_model": "base",
                "parent": number - 1,
                "trace_ids": [f"tr-{number}-{index}" for index in range(64)],
                "step": number,
                "metrics": figures,
                "sha256": "0" * 64,
                "libraries": {"torch": "2"},
                "path": f"/adapters/{name}/{number}",
                "created_at": at,
                "cursor": number,
            }
            yield {
                "agent": name,
                "number": number,
                "state": "serving" if number == VERSIONS else "retired",
                "manifest": manifest,
                "decision": {"accepted": True, "sentence": f"v{number}: +0.02 ± 0.05 on 40 prompts, serving"},
                "decided_at": at + 30,
                "served_at": at + 30,
                "created_at": at,
            }


def _ledger() -> Iterator[dict[str, Any]]:
    sums = {
        "sum_with": 20.0,
        "sumsq_with": 20.0,
        "n_with": 40,
        "sum_without": 4.0,
        "sumsq_without": 6.0,
        "n_without": 10,
    }
    for name in _names():
        for number in range(40):
            yield {"agent": name, "skill": f"skill-{number}", "uses": 50, **sums}


@contextmanager
def console(home: Path, core: int) -> Iterator[httpx.Client]:
    """A running console over ``home``, on one core; a client that is signed in to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = home / "config.yaml"
    settings = {
        "home": str(home),
        "mode": "rl",
        "console": {"key": KEY, "port": port},
        "skills": {"starter": False},
        "rl": {"remote_url": "http://127.0.0.1:9"},
        "vllm": {"url": "http://127.0.0.1:9"},
    }
    config.write_text(yaml.safe_dump({"metaclaw": settings}))
    env = os.environ | {"METACLAW_CONFIG": str(config)}
    process = subprocess.Popen(
        [sys.executable, "-m", "metaclaw_plugin.console"], env=env, cwd=ROOT, stderr=subprocess.DEVNULL
    )
    os.sched_setaffinity(process.pid, {core})
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=120) as client:
            _wait_until_ready(client)
            answer = client.post("/sign-in", data={"key": KEY})
            (token,) = re.findall(r"metaclaw_console=([^;]+);", answer.headers["set-cookie"])
            client.headers["cookie"] = f"metaclaw_console={token}"
            yield client
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(client: httpx.Client) -> None:
    for _ in range(600):
        try:
            if client.get("/healthz").status_code == 200:
                return
        except httpx.ConnectError:
            time.sleep(0.2)
    raise SystemExit("the console did not start within two minutes")


def pages(traces: int) -> dict[str, str]:
    """What is asked for: name -> path."""
    last = (traces // TURNS - 1) // 2 * 2 - 1  # a session of the busy agent
    return {
        "agents": "/",
        "busy agent": f"/agents/{BUSY}",
        "its curves": f"/agents/{BUSY}/curves",
        "other agent": "/agents/agent-07",
        "its curves ": "/agents/agent-07/curves",
        "conversations": f"/agents/{BUSY}/conversations",
        "older ones": f"/agents/{BUSY}/conversations?before={traces // 2}",
        "a conversation": f"/sessions/ses-{last}",
        "tokens": f"/traces/tr-{last * TURNS}/tokens",
        "skills": "/skills",
        "search": "/skills?q=matter 77",
        "a skill": "/skills/_shared/skill-7",
        "health": "/health",
    }


def measure(client: httpx.Client, traces: int, times: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each page: median and slowest of ``times``."""
    found = {}
    for name, path in pages(traces).items():
        taken = []
        for _ in range(times + 2):
            began = time.perf_counter()
            answer = client.get(path)
            taken.append((time.perf_counter() - began) * 1000)
            if answer.status_code != 200:
                raise SystemExit(f"{path} answers with status {answer.status_code}")
        found[name] = {"median_ms": statistics.median(taken[2:]), "slowest_ms": max(taken[2:])}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=15, help="times that each page is asked for")
    parser.add_argument("--core", type=int, default=0, help="the core that the console has")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmarks" / "console.json")
    given = parser.parse_args()
    results: dict[int, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for size in SIZES:
            home = Path(temporary) / str(size)
            home.mkdir()
            fill(home, size)
            with console(home, given.core) as client:
                results[size] = measure(client, size, given.times)
    small, large = SIZES
    print(f"| page | {small:,} traces: median | {large:,} traces: median | slowest of {given.times} | ratio |")
    print("|---|---|---|---|---|")
    for name, figures in results[large].items():
        before = results[small][name]["median_ms"]
        print(
            f"| {name.strip()} | {before:.0f} ms | {figures['median_ms']:.0f} ms | {figures['slowest_ms']:.0f} ms | "
            f"{figures['median_ms'] / before:.2f} |"
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({str(size): found for size, found in results.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
