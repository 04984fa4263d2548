"""The outermost layer of the gateway: sees every request before LiteLLM does, and every byte after it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from metaclaw_plugin.capture.transport import RECORDING
from metaclaw_plugin.gateway.answer import Answer
from metaclaw_plugin.gateway.current import CURRENT, CurrentRequest
from metaclaw_plugin.gateway.dialects import dialect_of
from metaclaw_plugin.gateway.request import Gateway

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class _TooLargeError(Exception):
    """The body is longer than allowed; raised into whoever reads it."""


class Edge:
    """ASGI middleware around the whole of LiteLLM."""

    def __init__(self, app: App, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        dialect = dialect_of(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if dialect is None:
            await self._app(scope, receive, send)
            return
        self._gateway.start()
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        current = CurrentRequest(dialect, headers)
        scope = self._take_credentials(scope, current)
        answer = Answer(current, self._gateway, send)
        body = _LimitedBody(receive, self._gateway.settings.gateway.max_body_bytes)
        if body.declares_too_much(headers):
            await answer.refuse(413, body.complaint)
            return
        tokens = CURRENT.set(current), RECORDING.set(None)
        try:
            await self._app(scope, body.receive, body.guard(answer))
        except _TooLargeError:
            if not answer.started:
                await answer.refuse(413, body.complaint)
        finally:
            CURRENT.reset(tokens[0])
            RECORDING.reset(tokens[1])
            answer.end()
            self._gateway.close_request(current)

    def _take_credentials(self, scope: Message, current: CurrentRequest) -> Message:
        """Take the caller's own upstream key off the request, so that LiteLLM never sees, logs or stores it."""
        name = self._gateway.settings.gateway.upstream_key_header
        if name is None or name.lower() not in current.headers:
            return scope
        current.upstream_key = current.headers.pop(name.lower())
        raw = name.lower().encode()
        return {**scope, "headers": [(key, value) for key, value in scope["headers"] if key.lower() != raw]}


class _LimitedBody:
    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0
        self._exceeded = False

    @property
    def complaint(self) -> str:
        limit = f"the request body is longer than {self._limit} bytes"
        return f"{limit}; send less, or raise metaclaw.gateway.max_body_bytes"

    def declares_too_much(self, headers: dict[str, str]) -> bool:
        length = headers.get("content-length", "")
        return length.isdigit() and int(length) > self._limit

    async def receive(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            self._exceeded = True
            raise _TooLargeError
        return message

    def guard(self, answer: Answer) -> Send:
        async def send(message: Message) -> None:
            if self._exceeded and not answer.started:  # whatever LiteLLM made of it, ours is the clearer answer
                raise _TooLargeError
            await answer.take(message)

        return send
