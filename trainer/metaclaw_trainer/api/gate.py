"""What every request passes first: whose key is it, and is its body small enough."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metaclaw_trainer.api.replies import error_response
from metaclaw_trainer.auth import KeyRing, host_of, is_loopback
from metaclaw_trainer.errors import KeyFileError

OPEN_PATHS = frozenset({"/v1/health"})


class Gate:
    """ASGI middleware. Puts ``caller`` (the key's name, ``""`` without keys) into the request's state."""

    def __init__(self, app: ASGIApp, ring: KeyRing, max_body: int) -> None:
        self._app = app
        self._ring = ring
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            refusal = self._refusal(scope, headers)
        except KeyFileError as error:
            refusal = (503, str(error), "key_file")
        if (
            refusal is None
            and (length := headers.get(b"content-length", "")).isdigit()
            and int(length) > self._max_body
        ):
            refusal = (413, self._too_large(), "body_too_large")
        if refusal is not None:
            status, message, code = refusal
            extra = {"www-authenticate": "Bearer"} if status == 401 else {}
            await error_response(status, message, code, extra)(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _refusal(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str, str] | None:
        state = scope.setdefault("state", {})
        state["caller"] = ""
        if scope["path"] in OPEN_PATHS:
            return None
        if not self._ring.needed:
            client = scope.get("client")
            local = client is not None and is_loopback(client[0]) and is_loopback(host_of(headers.get(b"host", "")))
            if local and is_loopback(_origin_host(headers.get(b"origin"))):
                return None
            return 403, "without a key the trainer answers on this machine's loopback only; make a key", "loopback_only"
        scheme, _, secret = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            return 401, "a key is needed: send it as Authorization: Bearer <key>", "missing_key"
        key = self._ring.find(secret.strip())
        if key is None:
            return 401, "this key was not made here, or was revoked", "invalid_key"
        state["caller"] = key.name
        return None

    def _counted(self, receive: Receive) -> Receive:
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self._max_body:
                    raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return (
            f"the body is larger than {self._max_body // 2**20} MiB: send fewer samples at once, "
            "or raise metaclaw.trainer.max_body_mib"
        )


def _origin_host(origin: str | None) -> str:
    """The host of an ``Origin`` header; loopback when there is none: no browser sent the request for a page."""
    if origin is None:
        return "127.0.0.1"
    return host_of(origin.partition("://")[2])
