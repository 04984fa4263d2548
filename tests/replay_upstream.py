"""An upstream that says exactly what it is told to say: recorded replies of vLLM, garbage, half streams.

A request names its script by the words ``case:NAME`` in any of its messages. A request that asks for both token ids and
log-probabilities gets what vLLM answered to such a request; any other gets what vLLM answered to the plain one.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "vllm_replies.json").read_text())
RECORDED_ID = "chatcmpl-0123456789abcdef"
_CASE = re.compile(r"case:([a-z0-9-]+)")


@dataclass
class Script:
    """One reply. ``step`` is awaited before each piece, so that a test can let them out one at a time."""

    plain: Sequence[bytes]
    rich: Sequence[bytes]
    status: int = 200
    content_type: str = "application/json"
    ending: Literal["proper", "abrupt", "hang"] = "proper"
    delay: float = 0.0  # seconds before each piece
    fresh_ids: bool = False  # every reply gets an id of its own
    step: Callable[[int], None] | None = None  # blocks until piece i may go; called in a thread

    @classmethod
    def recorded(cls, name: str, **changes: Any) -> Script:
        """What a real vLLM said, see record_vllm_replies.py."""
        case = RECORDED[name]
        plain = [piece.encode() for piece in case["plain"]]
        rich = [piece.encode() for piece in case["rich"]]
        return cls(plain, rich, case["status"], case["type"], **changes)

    @classmethod
    def stream(cls, *pieces: bytes, **changes: Any) -> Script:
        """The same stream for everyone."""
        return cls(pieces, pieces, content_type="text/event-stream", **changes)


@dataclass
class ReplayUpstream:
    """Serves ``scripts`` on a port of its own, in a thread of its own."""

    scripts: dict[str, Script] = field(default_factory=lambda: {name: Script.recorded(name) for name in RECORDED})
    requests: list[dict[str, Any]] = field(default_factory=list)  # bodies, in the order in which they came
    headers: list[Mapping[str, str]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ReplayUpstream:
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()

        def work() -> None:
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**26))
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            self._loop.run_forever()

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(_end_others(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the gateway was killed, or its client left
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
        raw = await reader.readexactly(int(headers.get("content-length", "0")))
        body = json.loads(raw or b"{}")
        self.requests.append(body)
        self.headers.append(headers)
        cases = _CASE.findall(raw.decode())
        script = self.scripts.get(cases[-1]) if cases else None
        if script is None:
            writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}")
            return True
        return await self._play(script, body, writer)

    async def _play(self, script: Script, body: Mapping[str, Any], writer: asyncio.StreamWriter) -> bool:
        pieces = script.rich if body.get("logprobs") and body.get("return_token_ids") else script.plain
        if script.fresh_ids:
            fresh = f"chatcmpl-{uuid.uuid4().hex}".encode()
            pieces = [piece.replace(RECORDED_ID.encode(), fresh) for piece in pieces]
        streams = script.content_type.startswith("text/event-stream")
        framing = "transfer-encoding: chunked" if streams else f"content-length: {sum(map(len, pieces))}"
        kind = f"content-type: {script.content_type}"
        writer.write(f"HTTP/1.1 {script.status} Said\r\n{kind}\r\n{framing}\r\n\r\n".encode())
        for place, piece in enumerate(pieces):
            if script.step is not None:
                await asyncio.to_thread(script.step, place)
            if script.delay:
                await asyncio.sleep(script.delay)
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if streams else piece)
            await writer.drain()
        if script.ending == "hang":
            await asyncio.sleep(3600)
        if script.ending == "abrupt":
            return False
        if streams:
            writer.write(b"0\r\n\r\n")
        return True


async def _end_others() -> None:
    """End every connection that is still being served, so that none is left to a loop that is closed."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
