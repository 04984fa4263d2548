"""What holds for every request and answer: headers that keep the browser in bounds, and no endless bodies."""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metaclaw_plugin.settings import Settings

MAX_BODY = 512 * 1024  # bytes; the longest is a skill of 64 KiB, which may treble when it is sent as a form


def frame_ancestors(settings: Settings) -> tuple[str, ...]:
    """The pages that may show the console: LiteLLM's admin UI and no other."""
    if settings.console.admin_ui:
        return tuple(settings.console.admin_ui)
    port = settings.gateway.port
    return (f"http://127.0.0.1:{port}", f"http://localhost:{port}")


def content_policy(ancestors: Iterable[str]) -> str:
    """Scripts, styles and pictures of our own alone; no inline script, no form that goes elsewhere."""
    return (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        f"form-action 'self'; base-uri 'none'; frame-ancestors {' '.join(ancestors)}"
    )


class Guard:
    """Middleware that adds the headers and measures bodies. It passes streams on as they come."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._headers = {
            "content-security-policy": content_policy(frame_ancestors(settings)),
            "x-content-type-options": "nosniff",
            "referrer-policy": "same-origin",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "permissions-policy": "camera=(), microphone=(), geolocation=()",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
                # What comes with a package may be kept by the browser; what was said in a conversation may not.
                headers["cache-control"] = "max-age=3600" if scope["path"].startswith("/static/") else "no-store"
            await send(message)

        length = Headers(scope=scope).get("content-length", "0")
        chunked = "transfer-encoding" in Headers(scope=scope)
        if chunked or not length.isdigit() or int(length) > MAX_BODY:
            answer = PlainTextResponse(f"a form may have up to {MAX_BODY:,} bytes, of a length that is told first", 413)
            await answer(scope, receive, guarded)
            return
        await self._app(scope, receive, guarded)
