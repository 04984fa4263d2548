"""Clients of benchmarks.publish: they ask without a pause, and hold every reply against the version that it names."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from benchmarks.publish_stage import Stage
from benchmarks.telltale import Telltale

VERSION_HEADER = "x-metaclaw-adapter"
REPLY_TOKENS = 24
CLOCK_TICK = 0.01  # seconds


@dataclass
class Tally:
    """What the streams saw."""

    replies: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # a word that the named version does not speak
    gaps: list[float] = field(default_factory=list)  # seconds between two chunks of one reply, but for the last
    ends: list[float] = field(default_factory=list)  # from the last chunk but one to the end: the trace is stored first
    at: list[tuple[float, str]] = field(default_factory=list)  # when each gap ended (``perf_counter``), in whose reply
    direct: list[float] = field(default_factory=list)  # the same of a stream that goes to vLLM itself
    late: list[float] = field(default_factory=list)  # seconds that a timer of the measuring process came too late
    seconds: float = 0.0  # that the phase lasted
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
        # This process holds torch: a full round of its collector would show as a gap in every stream.
        gc.collect()
        gc.freeze()
        async with self._http, asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._client(names[number % len(names)], number, stop))
            if count:
                group.create_task(self._direct(stop))
                group.create_task(self._look_at_the_clock(stop))
            await stop.wait()

    async def _client(self, agent: str, number: int, stop: asyncio.Event) -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            prompt = f"Stream {number} of {agent}, question {turn}: tell me something."
            try:
                await self.ask(agent, prompt, REPLY_TOKENS)
            except httpx.HTTPError as error:
                self.tally.failed.append(f"{agent}: {type(error).__name__} {error}")

    async def _direct(self, stop: asyncio.Event) -> None:
        """One more stream, of the base model, that goes to vLLM itself: its gaps are none of the gateway's doing."""
        turn = 0
        async with httpx.AsyncClient(base_url=self._stage.vllm, timeout=120, trust_env=False) as http:
            while not stop.is_set():
                turn += 1
                body = {
                    "model": "metaclaw-base",
                    "messages": [{"role": "user", "content": f"Direct question {turn}: tell me something."}],
                    "max_tokens": REPLY_TOKENS,
                    "stream": True,
                }
                last = 0.0
                async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                    async for line in answer.aiter_lines():
                        if not line.startswith('data: {"') or '"content":"' not in line:
                            continue
                        now = time.perf_counter()
                        if last:
                            self.tally.direct.append(now - last)
                        last = now

    async def _look_at_the_clock(self, stop: asyncio.Event) -> None:
        """How late this process itself comes to its turn: what is busy on the machine shows here too."""
        while not stop.is_set():
            before = time.perf_counter()
            await asyncio.sleep(CLOCK_TICK)
            self.tally.late.append(time.perf_counter() - before - CLOCK_TICK)

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
        gap = 0.0  # before the newest chunk; the last one is sent when the trace is committed
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
                if len(words) > 1:
                    tally.gaps.append(gap)
                    tally.at.append((last, version))
                if words:
                    gap = now - last
                else:
                    tally.first.append(now - started)
                    self.seen.setdefault(version, now)
                words.append(text)
                last = now
        if len(words) > 1:
            tally.ends.append(gap + time.perf_counter() - last)
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
        said = f"{agent} was told {version}, and heard {', '.join(others) or 'the base model'}: {text!r}"
        self.tally.wrong.append(said)
        print(said, flush=True)


@asynccontextmanager
async def talking(stage: Stage, spoken: dict[str, Telltale], count: int) -> AsyncIterator[Streams]:
    """``count`` streams that run for as long as the block does."""
    streams, stop, began = Streams(stage, spoken), asyncio.Event(), time.perf_counter()
    task = asyncio.create_task(streams.run(count, stop))
    try:
        yield streams
    finally:
        stop.set()
        await task
        streams.tally.seconds = time.perf_counter() - began
