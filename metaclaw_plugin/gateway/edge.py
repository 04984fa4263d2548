"""The outermost layer of the gateway: sees every request before LiteLLM does, and every byte after it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from metaclaw_plugin.gateway.answer import Answer
from metaclaw_plugin.gateway.bodies import REFUSED, Bodies, Body, Message, Receive, Refusal, Standing
from metaclaw_plugin.gateway.current import CURRENT, CurrentRequest
from metaclaw_plugin.gateway.dialects import dialect_of
from metaclaw_plugin.gateway.reach import is_open, is_opened
from metaclaw_plugin.gateway.request import Gateway

Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Edge:
    """ASGI middleware around the whole of LiteLLM; ``standing`` says of a request's scope what its key is worth."""

    def __init__(self, app: App, gateway: Gateway, standing: Callable[[Message], Awaitable[Standing]]) -> None:
        self._app = app
        self._gateway = gateway
        self._standing = standing
        self._bodies = Bodies(gateway.settings.gateway)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "websocket" and not self._opened(scope):
            await _refuse_websocket(receive, send)
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        posted = scope["method"] == "POST"
        dialect = dialect_of(scope["path"]) if posted else None
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        current = CurrentRequest(dialect or "chat", headers)
        scope = self._take_credentials(scope, current)
        answer = Answer(current, self._gateway, send)
        asks_model = posted and is_open("POST", scope["path"])
        body = Body(receive, headers, self._bodies)
        refusal = await body.read(lambda: self._standing(scope), wants_key=asks_model)
        if refusal is None and asks_model and body.is_no_object():
            refusal = Refusal(400, "the request body must be a JSON object")
        if refusal is not None:
            await answer.refuse(*refusal)
            return
        if body.unread:
            scope = {**scope, REFUSED: True}
        if dialect is None:
            await self._app(scope, body.receive, send)
            return
        self._gateway.open_request()
        token = CURRENT.set(current)
        try:
            await self._app(scope, body.receive, answer.take)
        finally:
            CURRENT.reset(token)
            answer.end()
            self._gateway.close_request(current)

    def _opened(self, scope: Message) -> bool:
        return is_opened(scope["path"], self._gateway.settings.gateway.open_routes)

    def _take_credentials(self, scope: Message, current: CurrentRequest) -> Message:
        """Take the caller's own upstream key off the request, so that LiteLLM never sees, logs or stores it."""
        name = self._gateway.settings.gateway.upstream_key_header
        if name is None or name.lower() not in current.headers:
            return scope
        current.upstream_key = current.headers.pop(name.lower())
        raw = name.lower().encode()
        return {**scope, "headers": [(key, value) for key, value in scope["headers"] if key.lower() != raw]}


async def _refuse_websocket(receive: Receive, send: Send) -> None:
    """Close it before it is accepted, which its client sees as 403: what its frames ask for passes no hook of ours."""
    await receive()  # websocket.connect
    await send({"type": "websocket.close", "code": 1008, "reason": "no WebSocket is open here"})
