"""The load of benchmarks.soak: requests on a schedule, whatever the latency; or so many streams at once."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TURNS = 2  # of a conversation
THINK = 0.5  # seconds between an answer and the next question of its conversation, at least
STREAMED = 0.6  # share of the requests that stream
LATE = 0.1  # seconds: a request that begins later than this after its time is counted as late
MAX_TOKENS = 24


@dataclass
class Reply:
    """One request and what became of it. Times are monotonic; latency counts from the time it was due."""

    due: float
    stream: bool
    first: float = 0.0  # when the first bytes of the body came
    ended: float = 0.0
    whole: bool = False  # it was received to its end
    trace: str = ""
    error: str = ""
    text: str = ""


@dataclass
class Conversation:
    """What one client has said and heard."""

    agent: str
    session: str
    messages: list[dict[str, str]] = field(default_factory=list)
    ready: float = 0.0  # when its next question may be asked


@dataclass
class Target:
    """Who is asked: ``url``; ``keys`` (agent -> key); ``model``, with {agent} in it; what each body holds besides."""

    url: str
    keys: Mapping[str, str]
    model: str = "metaclaw/{agent}"
    more: Mapping[str, Any] = field(default_factory=dict)


@asynccontextmanager
async def connected(patience: float) -> AsyncIterator[aiohttp.ClientSession]:
    """A client with a connection for each request, so that all gateway processes get their share of them."""
    connector = aiohttp.TCPConnector(force_close=True, limit=0)
    timeout = aiohttp.ClientTimeout(total=patience)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as http:
        yield http


async def ask(http: aiohttp.ClientSession, target: Target, talk: Conversation, stream: bool, due: float) -> Reply:
    """Ask the next question of ``talk``, and add the answer to it."""
    reply = Reply(due, stream)
    question = f"nonce={talk.session}-{len(talk.messages)} What goes on, {talk.agent}?"
    talk.messages.append({"role": "user", "content": question})
    body = {"model": target.model.format(agent=talk.agent), "messages": talk.messages, "max_tokens": MAX_TOKENS}
    headers = {"authorization": f"Bearer {target.keys[talk.agent]}", "x-session-id": talk.session}
    try:
        url = f"{target.url}/v1/chat/completions"
        async with http.post(url, json={**body, "stream": stream, **target.more}, headers=headers) as answer:
            reply.trace = answer.headers.get("x-metaclaw-trace-id", "")
            raw = b""
            async for piece in answer.content.iter_any():
                reply.first = reply.first or time.monotonic()
                raw += piece
        _read(reply, answer.status, raw, stream)
    except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    except (ValueError, LookupError) as error:
        reply.error = f"no answer of the kind that was asked for: {error!r}"
    reply.ended = time.monotonic()
    talk.messages.append({"role": "assistant", "content": reply.text})
    return reply


def _read(reply: Reply, status: int, raw: bytes, stream: bool) -> None:
    if status != 200:
        reply.error = f"{status}: {raw[:200].decode(errors='replace')}"
    elif not stream:
        reply.text = json.loads(raw)["choices"][0]["message"]["content"]
        reply.whole = True
    else:
        events = [line[6:] for line in raw.decode().splitlines() if line.startswith("data: ")]
        for event in map(json.loads, (line for line in events if line != "[DONE]")):
            if "error" in event:
                reply.error = str(event["error"])[:200]
                return
            reply.text += "".join(choice["delta"].get("content") or "" for choice in event.get("choices", ()))
        reply.whole = bool(events) and events[-1] == "[DONE]"
        reply.error = "" if reply.whole else "the stream broke off"


@dataclass
class OpenLoop:
    """``rate`` requests a second, each begun when its time has come, however long the answers before it take.

    A conversation that may go on does so before a new one begins. At most ``limit`` requests are under way; one whose
    time comes meanwhile is not begun, and counted in ``skipped``.
    """

    target: Target
    rate: float
    name: str  # of the sessions, so that two loads share none
    limit: int = 256
    patience: float = 60.0
    replies: list[Reply] = field(default_factory=list)
    skipped: int = 0
    late: int = 0  # begun more than LATE seconds after their time: this program was behind
    busy: int = 0
    _ready: deque[Conversation] = field(default_factory=deque)  # in the order in which they may go on
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Ask until ``stop``; returns when the last answer is there."""
        agents, chance = itertools.cycle(self.target.keys), random.Random(self.name)
        conversations = itertools.count()
        async with connected(self.patience) as http, asyncio.TaskGroup() as group:
            began = time.monotonic()
            for number in itertools.count():
                due = began + number / self.rate
                if await self._stopped_before(due):
                    return
                if self.busy >= self.limit:
                    self.skipped += 1
                    continue
                now = time.monotonic()
                self.late += now - due > LATE
                if self._ready and self._ready[0].ready <= now:
                    talk = self._ready.popleft()
                else:
                    talk = Conversation(next(agents), f"{self.name}-{next(conversations)}")
                self.busy += 1
                group.create_task(self._one(http, talk, chance.random() < STREAMED, due))

    def stop(self) -> None:
        self._stop.set()

    async def _stopped_before(self, due: float) -> bool:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), max(0.0, due - time.monotonic()))
        return self._stop.is_set()

    async def _one(self, http: aiohttp.ClientSession, talk: Conversation, stream: bool, due: float) -> None:
        try:
            reply = await ask(http, self.target, talk, stream, due)
        finally:
            self.busy -= 1
        self.replies.append(reply)
        if reply.whole and len(talk.messages) < 2 * TURNS:
            talk.ready = reply.ended + THINK
            self._ready.append(talk)


@dataclass
class AtOnce:
    """``count`` streams open at all times: where one ends, the next begins. The first begin over ``ramp`` seconds."""

    target: Target
    count: int
    name: str
    ramp: float
    patience: float = 600.0
    replies: list[Reply] = field(default_factory=list)
    skipped: int = 0
    late: int = 0
    busy: int = 0
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Keep them open until ``stop``; returns when the last has ended."""
        async with connected(self.patience) as http, asyncio.TaskGroup() as group:
            for number in range(self.count):
                group.create_task(self._client(http, number))

    def stop(self) -> None:
        self._stop.set()

    async def _client(self, http: aiohttp.ClientSession, number: int) -> None:
        agents = list(self.target.keys)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), self.ramp * number / self.count)
        for conversation in itertools.count():
            if self._stop.is_set():
                return
            talk = Conversation(agents[number % len(agents)], f"{self.name}-{number}-{conversation}")
            for _ in range(TURNS):
                self.busy += 1
                try:
                    reply = await ask(http, self.target, talk, True, time.monotonic())
                finally:
                    self.busy -= 1
                self.replies.append(reply)
                if self._stop.is_set() or not reply.whole:
                    break
            if not reply.whole:
                await asyncio.sleep(1.0)  # a refusal costs nothing: else it would be asked for thousands of times


Load = OpenLoop | AtOnce
