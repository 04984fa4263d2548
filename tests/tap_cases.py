"""Both ends of the tap: an upstream that says what it is told, and what a client would read behind it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx

from metaclaw_plugin.capture.transport import Recording, TapTransport

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "vllm_replies.json").read_text())
TEXT_STREAM = "text-stream"


class Upstream(httpx.AsyncBaseTransport):
    """Answers with the given pieces; an exception among them is raised."""

    def __init__(self, pieces: Sequence[bytes | Exception], status: int = 200, **headers: str) -> None:
        self.pieces = pieces
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.request: httpx.Request | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.request = request
        pieces = self.pieces

        class Body(httpx.AsyncByteStream):
            async def __aiter__(self) -> AsyncIterator[bytes]:
                for piece in pieces:
                    if isinstance(piece, Exception):
                        raise piece
                    yield piece

        return httpx.Response(self.status, headers=self.headers, stream=Body())


async def pass_through(
    upstream: Upstream, recording: Recording | None, body: bytes = b"{}"
) -> tuple[httpx.Response, list[bytes]]:
    """What comes out of the tap, chunk by chunk."""
    tap = TapTransport(upstream, lambda: recording)
    response = await tap.handle_async_request(httpx.Request("POST", "http://u/", content=body))
    assert isinstance(response.stream, httpx.AsyncByteStream)
    return response, [chunk async for chunk in response.stream]


def recording_for(case: dict[str, Any]) -> Recording:
    request = case["request"]
    return Recording(bool(request.get("logprobs")), bool(request.get("return_token_ids")))


def json_of(piece: bytes) -> Any:
    payload = piece.removeprefix(b"data: ").strip()
    return payload if payload == b"[DONE]" else json.loads(payload)
