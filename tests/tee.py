"""Stands between the gateway and vLLM, passes everything on piece by piece, and remembers what was asked and said.

What it says of tokens is read out of vLLM's own bytes, without any code of ours.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web

_HOP = {"content-length", "transfer-encoding", "connection", "date", "server"}


@dataclass
class Exchange:
    """One request to vLLM and its answer."""

    request: dict[str, Any]
    status: int
    content_type: str
    pieces: list[bytes] = field(default_factory=list)  # as vLLM wrote them

    def bodies(self) -> Iterator[dict[str, Any]]:
        """The events of a stream, or the one body."""
        text = b"".join(self.pieces)
        if not self.content_type.startswith("text/event-stream"):
            yield json.loads(text)
            return
        for line in text.split(b"\n"):
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])

    def tokens(self) -> dict[int, tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]]:
        """Choice -> token ids of prompt and answer, log-probabilities of the answer."""
        prompt: tuple[int, ...] = ()
        found: dict[int, tuple[list[int], list[float]]] = {}
        for body in self.bodies():
            prompt = tuple(body.get("prompt_token_ids") or prompt)
            for choice in body["choices"]:
                ids, logprobs = found.setdefault(choice["index"], ([], []))
                ids.extend(choice.get("token_ids") or ())
                logprobs.extend(entry["logprob"] for entry in (choice.get("logprobs") or {"content": ()})["content"])
        return {index: (prompt, tuple(ids), tuple(logprobs)) for index, (ids, logprobs) in found.items()}

    def unasked(self, keep_logprobs: bool) -> list[bytes]:
        """What vLLM says when nobody asks for token ids (and log-probabilities), as its recorded replies show."""
        if not self.content_type.startswith("text/event-stream"):
            return [_dump(_bare(json.loads(b"".join(self.pieces)), keep_logprobs))]
        events = [event for event in b"".join(self.pieces).split(b"\n\n") if event]
        bare = [_bare(json.loads(event[6:]), keep_logprobs) for event in events if event.startswith(b"data: {")]
        kept = [body for body in bare if not _empty(body)]
        ends = [event for event in events if not event.startswith(b"data: {")]
        return [b"data: " + _dump(body) + b"\n\n" for body in kept] + [end + b"\n\n" for end in ends]


def _dump(body: dict[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()  # as vLLM writes it


def _bare(body: dict[str, Any], keep_logprobs: bool) -> dict[str, Any]:
    if "prompt_token_ids" in body:
        body["prompt_token_ids"] = None
    for choice in body["choices"]:
        if "token_ids" in choice:
            choice["token_ids"] = None
        if not keep_logprobs:
            choice["logprobs"] = None
    return body


def _empty(body: dict[str, Any]) -> bool:
    """An event for a token that a parser holds back, which vLLM sends only to whom asks for token ids."""
    choices = body["choices"]
    return bool(choices) and all(c.get("delta") == {} and c.get("finish_reason") is None for c in choices)


class Tee:
    """Listens on a port of its own, in a thread of its own; ``exchanges`` in the order in which they began."""

    def __init__(self, upstream: str) -> None:
        self.exchanges: list[Exchange] = []
        self.port = 0
        self._upstream = upstream

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Tee:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _listen(self) -> None:
        self._session = aiohttp.ClientSession(auto_decompress=False, timeout=aiohttp.ClientTimeout(total=None))
        app = web.Application(client_max_size=2**26)
        app.router.add_route("*", "/{path:.*}", self._pass)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _close(self) -> None:
        await self._runner.cleanup()
        await self._session.close()

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP | {"host"}}
        async with self._session.request(
            request.method, self._upstream + request.path_qs, data=body or None, headers=headers
        ) as said:
            exchange = Exchange(json.loads(body or b"{}"), said.status, said.headers.get("content-type", ""))
            self.exchanges.append(exchange)
            kept = {name: value for name, value in said.headers.items() if name.lower() not in _HOP}
            answer = web.StreamResponse(status=said.status, headers=kept)
            await answer.prepare(request)
            async for data, _ in said.content.iter_chunks():
                if data:  # the end of a piece may come by itself
                    exchange.pieces.append(data)
                    await answer.write(data)
            await answer.write_eof()
        return answer
