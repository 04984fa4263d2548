"""Agents that talk without a pause, and remember what they asked, what they heard, and what went wrong."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import aiohttp

from tests.faults.stage import Stage

TURNS = 2
PAUSE = 0.35  # seconds between two questions of one client, about
PATIENCE = 60.0  # seconds for an answer

# How a request may fail, besides by an answer of another status than 200, which names itself.
REFUSED = "refused"  # nobody listened
CLOSED = "closed"  # before any byte of an answer
CUT = "cut"  # after an answer had begun
ERROR_EVENT = "error event"  # in a stream
ENDED_EARLY = "ended early"  # a stream without its last event, properly closed
TIMED_OUT = "timed out"


@dataclass
class Asked:
    """One request and what became of it. Times are monotonic."""

    nonce: str
    agent: str
    session: str
    messages: list[dict[str, str]]
    stream: bool
    began: float
    ended: float = 0.0
    status: int = 0  # 0: no answer
    whole: bool = False  # it was received to its end
    trace: str = ""
    version: str = ""  # as the header says: agent@vN
    text: str = ""
    failure: str = ""  # how it failed: one of the kinds above, or the status
    error: str = ""  # in words

    @property
    def failed(self) -> bool:
        return not self.whole


@dataclass
class Clients:
    """``count`` clients; each takes a new conversation when one is over."""

    stage: Stage
    count: int
    seed: int
    max_tokens: int = 24
    pause: float = PAUSE
    patience: float = PATIENCE
    streams: float = 0.6  # share of the requests that stream
    asked: list[Asked] = field(default_factory=list)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _go: asyncio.Event = field(default_factory=asyncio.Event)
    busy: int = 0

    async def run(self) -> None:
        """Talk until ``stop``."""
        self._go.set()
        # A connection of its own for each request: none is held by a process that has died meanwhile.
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        timeout = aiohttp.ClientTimeout(total=self.patience)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http, asyncio.TaskGroup() as group:
            for number in range(self.count):
                group.create_task(self._client(http, number))

    def stop(self) -> None:
        self._stop.set()
        self._go.set()

    async def hush(self) -> None:
        """Ask nothing more; returns when nothing is asked any more."""
        self._go.clear()
        while self.busy:
            await asyncio.sleep(0.02)

    def go_on(self) -> None:
        self._go.set()

    async def _client(self, http: aiohttp.ClientSession, number: int) -> None:
        agents = list(self.stage.keys)
        agent, chance = agents[number % len(agents)], random.Random(f"{self.seed}-{number}")
        conversation = 0
        while not self._stop.is_set():
            conversation += 1
            session = f"{self.seed}-{number}-{conversation}"
            messages: list[dict[str, str]] = []
            for turn in range(TURNS):
                await self._go.wait()
                if self._stop.is_set():
                    return
                nonce = f"{session}-{turn}"
                messages = [*messages, {"role": "user", "content": f"nonce={nonce} What goes on, {agent}?"}]
                asked = Asked(nonce, agent, session, messages, chance.random() < self.streams, time.monotonic())
                self.busy += 1
                try:
                    await self._ask(http, asked)
                finally:
                    self.busy -= 1
                    asked.ended = time.monotonic()
                    self.asked.append(asked)
                if asked.failed:
                    await asyncio.sleep(0.2)
                    break
                messages = [*messages, {"role": "assistant", "content": asked.text}]
                await asyncio.sleep(self.pause * chance.uniform(0.5, 1.5))

    async def _ask(self, http: aiohttp.ClientSession, asked: Asked) -> None:
        body = {
            "model": f"metaclaw/{asked.agent}",
            "messages": asked.messages,
            "stream": asked.stream,
            "max_tokens": self.max_tokens,
        }
        headers = {"authorization": f"Bearer {self.stage.keys[asked.agent]}", "x-session-id": asked.session}
        try:
            async with http.post(f"{self.stage.url}/v1/chat/completions", json=body, headers=headers) as answer:
                asked.status = answer.status
                asked.trace = answer.headers.get("x-metaclaw-trace-id", "")
                asked.version = answer.headers.get("x-metaclaw-adapter", "")
                raw = await answer.read()
        except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
            asked.failure, asked.error = _how(error, asked.status), f"{type(error).__name__}: {error}"
            return
        if asked.status != 200:
            asked.failure, asked.error = str(asked.status), raw[:300].decode(errors="replace")
        elif asked.stream:
            self._read_stream(asked, raw)
        else:
            asked.text = json.loads(raw)["choices"][0]["message"]["content"]
            asked.whole = True

    def _read_stream(self, asked: Asked, raw: bytes) -> None:
        for line in raw.decode().splitlines():
            if line == "data: [DONE]":
                asked.whole = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    asked.failure, asked.error = ERROR_EVENT, str(event["error"])[:300]
                    return
                asked.text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
        if not asked.whole:
            asked.failure, asked.error = ENDED_EARLY, f"after {len(asked.text)} characters"


def _how(error: Exception, status: int) -> str:
    """The kind of a failure without a whole answer; ``status``: 0 before any byte of one."""
    if isinstance(error, TimeoutError):
        return TIMED_OUT
    if isinstance(error, aiohttp.ClientConnectorError):
        return REFUSED
    return CUT if status else CLOSED
