"""A connection that the upstream closes just when it is used again. LiteLLM's own transport, real sockets."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

from metaclaw_plugin.gateway.healing import HealingTransport
from metaclaw_plugin.gateway.routing import InFlight
from metaclaw_plugin.store.engine import open_store

ANSWER = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 11\r\n\r\n{"ok":true}'
BODY = {"model": "metaclaw-base", "messages": []}


class Upstream:
    """Answers the first request of each connection; ``ends`` decides what becomes of the one after it."""

    def __init__(self, ends: str) -> None:
        self.ends = ends
        self.bodies: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._read(reader)
        if self.ends != "at once":
            writer.write(ANSWER)
            await writer.drain()
            await self._read(reader)
        if self.ends == "with a reset":
            raw: socket.socket = writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        self.bodies.append(await reader.readexactly(int(length.partition(b":")[2])))


@asynccontextmanager
async def asking(upstream: Upstream, tmp_path: Path) -> AsyncIterator[Callable[[], Any]]:
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    network = AsyncHTTPHandler.create_async_transport()
    assert network is not None, "LiteLLM has another transport than in the gateway"
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    healing = HealingTransport(network, engine, InFlight(engine, "p1"), lambda *_: None)
    client = httpx.AsyncClient(transport=healing, base_url=f"http://127.0.0.1:{port}")
    try:
        yield lambda: client.post("/v1/chat/completions", json=BODY)
    finally:
        await network.aclose()
        server.close()


@pytest.mark.law(5)
@pytest.mark.parametrize("ends", ["with an end", "with a reset"])
async def test_law_5_it_is_asked_once_more_on_another(ends: str, tmp_path: Path) -> None:
    upstream = Upstream(ends)
    async with asking(upstream, tmp_path) as ask:
        assert (await ask()).json() == {"ok": True}
        assert (await ask()).json() == {"ok": True}
    assert len(upstream.bodies) == 3
    assert len(set(upstream.bodies)) == 1


async def test_one_that_never_answers_is_asked_twice_and_no_more(tmp_path: Path) -> None:
    upstream = Upstream("at once")
    async with asking(upstream, tmp_path) as ask:
        with pytest.raises(httpx.ReadError, match="Server disconnected"):
            await ask()
    assert len(upstream.bodies) == 2


async def test_one_that_is_not_there_is_asked_once(tmp_path: Path, free_port: Callable[[], int]) -> None:
    network = AsyncHTTPHandler.create_async_transport()
    assert network is not None
    tried: list[str] = []

    class Counting(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            tried.append(request.url.path)
            return await network.handle_async_request(request)

    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    healing = HealingTransport(Counting(), engine, InFlight(engine, "p1"), lambda *_: None)
    async with httpx.AsyncClient(transport=healing, base_url=f"http://127.0.0.1:{free_port()}") as client:
        with pytest.raises(httpx.ConnectError):
            await client.post("/v1/chat/completions", json=BODY)
    await network.aclose()
    assert len(tried) == 1
