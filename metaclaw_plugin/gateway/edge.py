"""The outermost layer of the gateway: sees every request before LiteLLM does, and every byte after it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from metaclaw_plugin.gateway.answer import Answer
from metaclaw_plugin.gateway.current import CURRENT, CurrentRequest
from metaclaw_plugin.gateway.dialects import dialect_of
from metaclaw_plugin.gateway.reach import is_open
from metaclaw_plugin.gateway.request import Gateway

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_OTHER_JSON = frozenset(bytes([first]) for first in b'["-0123456789tfn')  # first bytes of JSON values but objects


class Edge:
    """ASGI middleware around the whole of LiteLLM."""

    def __init__(self, app: App, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        dialect = dialect_of(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if dialect is None:
            await self._pass(scope, receive, send)
            return
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        current = CurrentRequest(dialect, headers)
        scope = self._take_credentials(scope, current)
        answer = Answer(current, self._gateway, send)
        body = _Body(receive, headers, self._gateway.settings.gateway.max_body_bytes)
        if (refusal := await body.read()) is not None:
            await answer.refuse(*refusal)
            return
        self._gateway.open_request()
        token = CURRENT.set(current)
        try:
            await self._app(scope, body.receive, answer.take)
        finally:
            CURRENT.reset(token)
            answer.end()
            self._gateway.close_request(current)

    async def _pass(self, scope: Message, receive: Receive, send: Send) -> None:
        """What asks for no answer of a model: LiteLLM reads its body, and no more of it than is allowed."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._gateway.settings.gateway.max_body_bytes
        refuse = Answer(CurrentRequest("chat", {}), self._gateway, send).refuse
        if scope["method"] == "POST" and is_open(scope["path"]):
            headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
            body = _Body(receive, headers, limit)
            if (refusal := await body.read()) is not None:
                await refuse(*refusal)
                return
            await self._app(scope, body.receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            await refuse(*_too_long(limit))
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > limit:
                raise HTTPException(*_too_long(limit))
            return message

        await self._app(scope, counted, send)

    def _take_credentials(self, scope: Message, current: CurrentRequest) -> Message:
        """Take the caller's own upstream key off the request, so that LiteLLM never sees, logs or stores it."""
        name = self._gateway.settings.gateway.upstream_key_header
        if name is None or name.lower() not in current.headers:
            return scope
        current.upstream_key = current.headers.pop(name.lower())
        raw = name.lower().encode()
        return {**scope, "headers": [(key, value) for key, value in scope["headers"] if key.lower() != raw]}


class _Body:
    """A request's body, read whole before LiteLLM sees any of it, as LiteLLM itself would before it does anything."""

    def __init__(self, receive: Receive, headers: dict[str, str], limit: int) -> None:
        self._receive = receive
        self._headers = headers
        self._limit = limit
        self._ready: list[Message] = []  # what the application has yet to be given

    async def read(self) -> tuple[int, str] | None:
        """Status and complaint if the body cannot be taken."""
        length = self._headers.get("content-length", "")
        if length.isdigit() and int(length) > self._limit:
            return _too_long(self._limit)
        parts, size, more = [], 0, True
        while more:
            message = await self._receive()
            if message["type"] != "http.request":  # the client has left
                self._ready = [message]
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            more = message.get("more_body", False)
            if size > self._limit:
                return _too_long(self._limit)
        body = b"".join(parts)
        self._ready = [{"type": "http.request", "body": body, "more_body": False}]
        # LiteLLM takes any JSON value for an object, and fails over it with a bare 500.
        if "form" not in self._headers.get("content-type", "") and body.lstrip()[:1] in _OTHER_JSON:
            return 400, "the request body must be a JSON object"
        return None

    async def receive(self) -> Message:
        return self._ready.pop() if self._ready else await self._receive()


def _too_long(limit: int) -> tuple[int, str]:
    return 413, f"the request body is longer than {limit} bytes; send less, or raise metaclaw.gateway.max_body_bytes"
