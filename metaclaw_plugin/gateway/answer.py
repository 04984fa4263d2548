"""The way out: every message of an answer passes here on its way to the client.

What is held back is the last of an answer, for as long as its trace takes to be committed, and no longer than the
configured wait (law 3). All other bytes pass as they come. An error that LiteLLM wrote in OpenAI's shape to a client
that speaks Anthropic's is put into that shape (law 9).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

from metaclaw_hooks.types import BASE_VERSION

from metaclaw_plugin.capture.transport import Recording
from metaclaw_plugin.capture.visible import VisibleAnswer
from metaclaw_plugin.gateway.current import CurrentRequest, Plan
from metaclaw_plugin.gateway.dialects import as_chat_request, error_body, in_dialect
from metaclaw_plugin.gateway.request import Gateway
from metaclaw_plugin.gateway.routing import Route

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]

TRACE_HEADER = b"x-metaclaw-trace-id"
ADAPTER_HEADER = b"x-metaclaw-adapter"


class Answer:
    """One answer on its way to the client."""

    def __init__(self, current: CurrentRequest, gateway: Gateway, send: Callable[[Message], Awaitable[None]]) -> None:
        self.started = False
        self._current = current
        self._gateway = gateway
        self._send = send
        self._held_start: Message | None = None  # of an error whose body may have to be put into another shape
        self._held_body = b""
        self._visible: VisibleAnswer | None = None

    async def take(self, message: Message) -> None:
        """Pass on one ASGI message."""
        if message["type"] == "http.response.start":
            await self._start(message)
        elif message["type"] == "http.response.body" and self._held_start is not None:
            await self._error(message)
        elif message["type"] == "http.response.body":
            await self._body(message)
        else:
            await self._send(message)

    async def refuse(self, status: int, complaint: str, more: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """Answer with an error of ours; ``more``: headers of it."""
        self.started = True
        body = json.dumps(error_body(self._current.dialect, status, complaint)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": [*headers, *more]})
        await self._send({"type": "http.response.body", "body": body})

    def end(self) -> None:
        """Nothing more will be sent; what was seen of an answer that broke off is left to be kept."""
        if self._visible is not None and self._current.recording is None:
            self._current.recording = _recording(self._current, self._visible)

    async def _start(self, message: Message) -> None:
        self.started = True
        if message["status"] >= 300:
            self._current.committed = True  # whatever the upstream said, the client gets none of it
        headers = {key.lower(): value for key, value in message.get("headers", ())}
        if message["status"] == 404:
            self._report_unrouted()
        if self._current.dialect == "messages" and message["status"] >= 400 and b"content-encoding" not in headers:
            self._held_start = message
            return
        answered = message["status"] < 300
        if answered and self._current.plan is not None and self._current.plan.turn is not None:
            self._watch(self._current.plan, headers)
        added = []
        if (plan := self._current.plan) is not None and plan.on_own_model:
            added.append((ADAPTER_HEADER, f"{plan.agent.name}@v{plan.route.adapter_version}".encode()))
        if plan is not None and plan.turn is not None and not plan.over_quota and answered:
            added.append((TRACE_HEADER, plan.trace_id.encode()))
        message["headers"] = [*message.get("headers", ()), *added]
        await self._send(message)

    def _report_unrouted(self) -> None:
        """Say so if vLLM may have been asked by the name that the client gave: past our hook, or past the tap."""
        plan, recording = self._current.plan, self._current.recording
        if plan is not None and plan.on_own_model and (recording is None or recording.status is None):
            passed = "LiteLLM's hook before the call" if recording is None else "the tap"
            logger.error("a request of %s was answered 404 past %s", plan.agent.name, passed)

    def _watch(self, plan: Plan, headers: dict[bytes, bytes]) -> None:
        """Read along what goes to the client, where the answer did not come through the tap."""
        recording = self._current.recording
        if recording is not None and recording.status is not None and recording.status < 300:
            return
        self._current.recording = None
        if plan.on_own_model:  # a fallback of the owner's, or LiteLLM's cache, answered instead
            name = headers.get(b"x-litellm-model-name", b"unknown").decode("latin-1")
            self._current.plan = replace(plan, route=Route(name, BASE_VERSION))
        streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        packed = headers.get(b"content-encoding") == b"gzip"
        self._visible = VisibleAnswer(self._current.dialect, streams, packed)

    async def _body(self, message: Message) -> None:
        current, data = self._current, message.get("body", b"")
        current.sniff(data)
        if self._visible is not None:
            self._read_along(self._visible, data, last=not message.get("more_body", False))
        recording = current.recording
        if recording is not None and recording.over and not current.committed:
            await self._gateway.commit(current)
        await self._send(message)

    def _read_along(self, visible: VisibleAnswer, data: bytes, last: bool) -> None:
        visible.feed(data)
        if last:
            visible.end()
        if last or visible.complete:
            self._visible = None
            self._current.recording = _recording(self._current, visible)
            self._current.recording.end()

    async def _error(self, message: Message) -> None:
        self._held_body += message.get("body", b"")
        if message.get("more_body", False) or self._held_start is None:
            return
        start, self._held_start = self._held_start, None
        body = in_dialect(self._current.dialect, start["status"], self._held_body)
        kept = [(key, value) for key, value in start.get("headers", ()) if key.lower() != b"content-length"]
        start["headers"] = [*kept, (b"content-length", str(len(body)).encode())]
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})


def _recording(current: CurrentRequest, visible: VisibleAnswer) -> Recording:
    return Recording(
        keep_logprobs=True,
        keep_token_ids=True,
        request_body=as_chat_request(current.dialect, current.data),
        status=200,
        reply=visible.reply,
        complete=visible.complete and not visible.reply.garbled,
        started_at=current.started_at,
    )
