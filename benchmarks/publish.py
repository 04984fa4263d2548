"""Publishing under load: real gateway, worker, trainer and vLLM, and adapters that betray which version spoke.

    python -m benchmarks.publish [--publishes 200] [--agents 8] [--streams 16] [--json FILE]

Versions are committed to the trainer's list as its training loop commits them; everything after that is the product.
Streams ask without a pause, at temperature 0, and every reply is held against the version that its header names. First
comes a phase without publishing, which says what gaps between chunks are normal here; then one in which adapters that
nobody asks for are loaded into vLLM directly, which says what loading alone costs the streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from metaclaw_hooks.types import AdapterVersion
from metaclaw_trainer.store import open_store as open_trainer_store
from metaclaw_trainer.versions import StoredVersions

from benchmarks.publish_stage import Stage, memory, running, set_stage
from benchmarks.telltale import Telltale, TelltaleMaker
from demo.models import model_path

VERSION_HEADER = "x-metaclaw-adapter"
REPLY_TOKENS = 24
QUIET_SECONDS = 30.0
BARE_LOADS = 20
PUBLISH_TIMEOUT = 60.0


@dataclass
class Tally:
    """What the streams saw."""

    replies: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # a word that the named version does not speak
    gaps: list[float] = field(default_factory=list)  # seconds between two chunks of one reply
    first: list[float] = field(default_factory=list)  # seconds to a reply's first word


class Streams:
    """Clients that ask without a pause until they are stopped."""

    def __init__(self, stage: Stage, spoken: dict[str, Telltale]) -> None:
        self._stage = stage
        self._spoken = spoken
        self.tally = Tally()
        self.seen: dict[str, float] = {}  # version -> when its first word came
        self._http = httpx.AsyncClient(base_url=stage.gateway, timeout=120, trust_env=False)

    async def run(self, count: int, stop: asyncio.Event) -> None:
        names = list(self._stage.keys)
        async with self._http, asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._client(names[number % len(names)], number, stop))

    async def _client(self, agent: str, number: int, stop: asyncio.Event) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            prompt = f"Stream {number} of {agent}, question {turn}: tell me something."
            try:
                await self.ask(agent, prompt, REPLY_TOKENS)
            except httpx.HTTPError as error:
                self.tally.failed.append(f"{agent}: {type(error).__name__} {error}")

    async def ask(self, agent: str, prompt: str, tokens: int) -> str:
        """One streamed reply; returns the version that its header names."""
        tally, words = self.tally, []
        body = {
            "model": f"metaclaw/{agent}",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
        }
        headers = {"authorization": f"Bearer {self._stage.keys[agent]}"}
        started = last = time.perf_counter()
        async with self._http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer:
            if answer.status_code != 200:
                tally.failed.append(f"{agent}: {answer.status_code} {(await answer.aread())[:200]!r}")
                return ""
            version = answer.headers[VERSION_HEADER]
            done = False
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                done = line == "data: [DONE]"
                choices = [] if done else json.loads(line[6:]).get("choices", [])
                text = choices[0]["delta"].get("content") if choices else None
                if not text:
                    continue
                now = time.perf_counter()
                if words:
                    tally.gaps.append(now - last)
                else:
                    tally.first.append(now - started)
                    self.seen.setdefault(version, now)
                words.append(text)
                last = now
        self._check(agent, version, "".join(words), done)
        return version

    def _check(self, agent: str, version: str, text: str, done: bool) -> None:
        self.tally.replies += 1
        if not done:
            self.tally.failed.append(f"{agent}: the stream of {version} broke off")
        if version == f"{agent}@v0":  # the base model
            if any(telltale.speaks(text) for telltale in self._spoken.values()):
                self.tally.wrong.append(f"the base model spoke as an adapter: {text[:80]!r}")
        elif not version.startswith(f"{agent}@v") or not self._spoken[version].speaks(text):
            self._blame(agent, version, text)

    def _blame(self, agent: str, version: str, text: str) -> None:
        """Note who spoke instead."""
        others = [name for name, telltale in self._spoken.items() if not telltale.words.isdisjoint(text.split())]
        said = f"{agent} was told {version}, and heard {', '.join(others) or 'the base model'}: {text[:80]!r}"
        self.tally.wrong.append(said)
        print(said, flush=True)


class Publishing:
    """Commits versions as the training loop does, and waits until each one answers."""

    def __init__(self, stage: Stage, maker: TelltaleMaker, spoken: dict[str, Telltale]) -> None:
        self._stage, self._maker, self._spoken = stage, maker, spoken
        self._store = open_trainer_store(f"sqlite:///{stage.trainer_home / 'queue.db'}")
        self._versions = StoredVersions(self._store, "benchmark")
        self.seconds: list[float] = []  # from commit to the first word by the new version

    async def publish(self, agent: str, streams: Streams) -> None:
        """One more version of ``agent``; returns when a reply by it has begun."""
        head = self._versions.head(agent)
        number = head.newest + 1
        name = f"{agent}@v{number}"
        telltale = self._maker.make(f"{agent}-v{number}")
        self._spoken[name] = telltale
        version = AdapterVersion(
            agent=agent,
            number=number,
            base_model=str(self._maker.model),
            parent=head.head,
            trace_ids=(),
            step=number,
            metrics={},
            sha256=telltale.sha256,
            libraries={},
            path=str(telltale.path),
            created_at=time.time(),
        )
        started = time.perf_counter()
        if not await asyncio.to_thread(self._versions.commit, version, [], head.generation):
            raise SystemExit(f"the trainer did not list {name}")
        turn = 0
        while name not in streams.seen:
            turn += 1
            await streams.ask(agent, f"Probe {turn} for {name}.", 2)
            if time.perf_counter() - started > PUBLISH_TIMEOUT:
                raise SystemExit(f"{name} did not answer within {PUBLISH_TIMEOUT:.0f} s")
        self.seconds.append(streams.seen[name] - started)


@asynccontextmanager
async def talking(stage: Stage, spoken: dict[str, Telltale], count: int) -> AsyncIterator[Streams]:
    """Streams that run for as long as the block does."""
    streams, stop = Streams(stage, spoken), asyncio.Event()
    task = asyncio.create_task(streams.run(count, stop))
    try:
        yield streams
    finally:
        stop.set()
        await task


async def load_directly(stage: Stage, model: Path) -> list[float]:
    """Load spare adapters into vLLM one by one; the seconds that each took, and nothing is left of them."""
    seconds: list[float] = []
    maker = TelltaleMaker(model, stage.home / "spare")  # outside the trainer's folder, so that it leaves them alone
    async with httpx.AsyncClient(base_url=stage.vllm, timeout=60, trust_env=False) as http:
        for number in range(BARE_LOADS):
            name = f"spare-{number}"
            body = {"lora_name": name, "lora_path": str(maker.make(name).path)}
            started = time.perf_counter()
            (await http.post("/v1/load_lora_adapter", json=body)).raise_for_status()
            seconds.append(time.perf_counter() - started)
            await asyncio.sleep(0.5)
            (await http.post("/v1/unload_lora_adapter", json={"lora_name": name})).raise_for_status()
    return seconds


async def publish_all(
    stage: Stage, maker: TelltaleMaker, spoken: dict[str, Telltale], streams: Streams, options: argparse.Namespace
) -> tuple[list[float], list[dict[str, float]]]:
    """All publishes, agent after agent; seconds of each, and memory along the way."""
    publishing, agents = Publishing(stage, maker, spoken), list(stage.keys)
    sizes: list[dict[str, float]] = []
    for number in range(options.publishes):
        await publishing.publish(agents[number % len(agents)], streams)
        if number % max(1, options.publishes // 20) == 0:
            sizes.append(memory(stage))
            print(
                f"{number + 1} published, {streams.tally.replies} replies, {len(streams.tally.failed)} failed, "
                f"{len(streams.tally.wrong)} wrong, last in {publishing.seconds[-1]:.2f} s",
                flush=True,
            )
    sizes.append(memory(stage))
    return publishing.seconds, sizes


async def measure(stage: Stage, options: argparse.Namespace) -> dict[str, Any]:
    """All phases; the report."""
    maker = TelltaleMaker(Path(options.model), stage.trainer_home / "telltale")
    spoken: dict[str, Telltale] = {}
    async with talking(stage, spoken, options.streams) as quiet:
        await asyncio.sleep(options.quiet)
    print(f"without publishing: {quiet.tally.replies} replies, {len(quiet.tally.failed)} failed", flush=True)
    async with talking(stage, spoken, options.streams) as loading:
        loads = await load_directly(stage, Path(options.model))
    started = time.perf_counter()
    async with talking(stage, spoken, options.streams) as busy:
        seconds, sizes = await publish_all(stage, maker, spoken, busy, options)
    wall = time.perf_counter() - started
    async with httpx.AsyncClient(trust_env=False) as http:
        loaded = len((await http.get(f"{stage.vllm}/v1/models")).json()["data"]) - 1
    phases = {"without": quiet.tally, "bare_loads": loading.tally, "publishing": busy.tally}
    return report(phases, loads, seconds, sizes) | {"seconds": round(wall, 1), "loaded_at_the_end": loaded}


def report(
    phases: dict[str, Tally], loads: list[float], seconds: list[float], sizes: list[dict[str, float]]
) -> dict[str, Any]:
    """Figures as JSON."""
    failed = [line for tally in phases.values() for line in tally.failed]
    wrong = [line for tally in phases.values() for line in tally.wrong]
    return {
        "publishes": len(seconds),
        "replies": {name: tally.replies for name, tally in phases.items()},
        "failed_count": len(failed),
        "failed": failed[:20],
        "wrong_count": len(wrong),
        "wrong": wrong[:20],
        "publish": spread(seconds),
        "vllm_load": spread(loads),
        **{f"gap_{name}": spread(tally.gaps) for name, tally in phases.items()},
        **{f"first_word_{name}": spread(tally.first) for name, tally in phases.items()},
        "memory_mib": {"first": sizes[0], "half": sizes[len(sizes) // 2], "end": sizes[-1]},
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
    }


def spread(values: list[float]) -> dict[str, float]:
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
    for when, sizes in found["memory_mib"].items():
        print(f"MiB {when:<6}" + "".join(f"{part} {size:7.1f}   " for part, size in sorted(sizes.items())))
    print(f"adapters loaded at the end: {found['loaded_at_the_end']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publishes", type=int, default=200)
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--quiet", type=float, default=QUIET_SECONDS, help="seconds of the phase without publishing")
    parser.add_argument("--model", type=Path, default=None, help="a small Llama with tied embeddings; unset: tiny")
    parser.add_argument("--json", type=Path, help="write the report there")
    options = parser.parse_args()
    options.model = options.model or model_path("tiny")
    with tempfile.TemporaryDirectory(prefix="metaclaw-publish-") as folder:
        stage = set_stage(Path(folder), options.model, options.agents)
        with running(stage):
            found = asyncio.run(measure(stage, options))
    print_table(found)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    if found["failed_count"] or found["wrong_count"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
