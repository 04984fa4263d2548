"""The outermost layer of the gateway: sees every request before LiteLLM does, and every byte after it.

What it holds back is the last of an answer, for as long as its trace takes to be committed, and no longer than the
configured wait (law 3). All other bytes pass as they come.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from metaclaw_plugin.capture.transport import RECORDING
from metaclaw_plugin.gateway.current import CURRENT, CurrentRequest
from metaclaw_plugin.gateway.dialects import dialect_of, error_body
from metaclaw_plugin.gateway.request import Gateway

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

TRACE_HEADER = b"x-metaclaw-trace-id"
ADAPTER_HEADER = b"x-metaclaw-adapter"


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
        answer = _Answer(current, self._gateway, send)
        body = _LimitedBody(receive, self._gateway.settings.gateway.max_body_bytes)
        if body.declares_too_much(headers):
            await answer.refuse(413, body.complaint)
            return
        tokens = CURRENT.set(current), RECORDING.set(None)
        try:
            await self._app(scope, body.receive, answer.send_unless_too_large(body))
        except _TooLargeError:
            if not answer.started:
                await answer.refuse(413, body.complaint)
        finally:
            CURRENT.reset(tokens[0])
            RECORDING.reset(tokens[1])
            self._gateway.close_request(current)


class _LimitedBody:
    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._seen = 0
        self.exceeded = False

    @property
    def complaint(self) -> str:
        return (
            f"the request body is longer than {self._limit} bytes; send less, or raise metaclaw.gateway.max_body_bytes"
        )

    def declares_too_much(self, headers: dict[str, str]) -> bool:
        length = headers.get("content-length", "")
        return length.isdigit() and int(length) > self._limit

    async def receive(self) -> Message:
        message = await self._receive()
        self._seen += len(message.get("body", b""))
        if self._seen > self._limit:
            self.exceeded = True
            raise _TooLargeError
        return message


class _Answer:
    def __init__(self, current: CurrentRequest, gateway: Gateway, send: Send) -> None:
        self._current = current
        self._gateway = gateway
        self._send = send
        self.started = False

    def send_unless_too_large(self, body: _LimitedBody) -> Send:
        async def send(message: Message) -> None:
            if body.exceeded and not self.started:  # whatever LiteLLM made of it, ours is the clearer answer
                raise _TooLargeError
            await self._pass(message)

        return send

    async def _pass(self, message: Message) -> None:
        current = self._current
        if message["type"] == "http.response.start":
            self.started = True
            self._name_trace(message)
        elif message["type"] == "http.response.body":
            current.sniff(message.get("body", b""))
            recording = current.recording
            if recording is not None and recording.over and not current.committed:
                await self._gateway.commit(current)
        await self._send(message)

    def _name_trace(self, message: Message) -> None:
        plan = self._current.plan
        if plan is None:
            return
        added = [(ADAPTER_HEADER, f"{plan.agent.name}@v{plan.route.adapter_version}".encode())]
        if plan.turn is not None and message["status"] < 300:
            added.append((TRACE_HEADER, plan.trace_id.encode()))
        message["headers"] = [*message.get("headers", ()), *added]

    async def refuse(self, status: int, complaint: str) -> None:
        self.started = True
        body = json.dumps(error_body(self._current.dialect, status, complaint)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})
