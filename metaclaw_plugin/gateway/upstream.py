"""What the gateway needs of LiteLLM itself: the names that its router knows, and its HTTP client."""

from __future__ import annotations

from functools import cache
from typing import Any

import httpx
from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler

from metaclaw_plugin.capture.transport import TapTransport
from metaclaw_plugin.gateway.routing import UPSTREAM


@cache
def tapped_client() -> Any:
    """LiteLLM's HTTP client with our tap around the transport that it would use anyway; one per process."""
    inner = AsyncHTTPHandler.create_async_transport()
    return AsyncHTTPHandler(transport=TapTransport(inner if inner is not None else httpx.AsyncHTTPTransport()))


def is_listed(model: str) -> bool:
    """Whether a deployment other than ours answers to ``model``: by name, or by a pattern of the owner's."""
    from litellm.proxy import proxy_server

    router = proxy_server.llm_router
    if router is None:
        return False
    if model.startswith(f"{UPSTREAM}/"):
        return False
    return model in router.model_names or bool(router.pattern_router.route(model))
