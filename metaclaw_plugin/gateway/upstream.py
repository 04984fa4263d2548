"""What the gateway needs of LiteLLM itself: the names that its router knows, and its HTTP client."""

from __future__ import annotations

from functools import cache
from typing import Any

import httpx
import litellm
from litellm.llms.custom_httpx.http_handler import AsyncHTTPHandler
from litellm.proxy import proxy_server
from litellm.proxy.common_request_processing import _stream_usage_tracking_updates
from litellm.router import Router

from metaclaw_plugin.capture.transport import TapTransport
from metaclaw_plugin.gateway.current import present_recording
from metaclaw_plugin.gateway.healing import HealingTransport
from metaclaw_plugin.gateway.process import this_process
from metaclaw_plugin.gateway.routing import UPSTREAM
from metaclaw_plugin.gateway.runtime import process_gateway

_RATES = (
    "input_cost_per_token",
    "output_cost_per_token",
    "cache_creation_input_token_cost",
    "cache_read_input_token_cost",
)


@cache
def tapped_client() -> Any:
    """LiteLLM's HTTP client, with our tap and our help around the transport that it would use; one per process."""
    network = AsyncHTTPHandler.create_async_transport() or httpx.AsyncHTTPTransport()
    gateway = process_gateway()
    healing = HealingTransport(network, this_process().engine, gateway.in_flight, gateway.metrics.count)
    return AsyncHTTPHandler(transport=TapTransport(healing, present_recording))


def ask_for_usage(data: dict[str, Any]) -> None:
    """Let LiteLLM ask vLLM for a stream's usage, and hide it, as it does for models that it knows by the client's name.

    Without it, LiteLLM tokenises the whole prompt again after every stream, for its log.
    """
    general = proxy_server.general_settings
    data.update(
        _stream_usage_tracking_updates(
            data=data, general_settings=general, route_type="acompletion", supports_stream_options=lambda: True
        )
    )


@cache
def give_price(agent: str, upstream_name: str) -> None:
    """Tell LiteLLM that the agent's own model costs nothing, by each name that it looks up, unless it has a price.

    A model without a price is looked for in the whole price list, eight times a request.
    """
    free = dict.fromkeys(_RATES, 0.0)
    names = (f"hosted_vllm/{name}" for name in (agent, upstream_name, f"{UPSTREAM}/{agent}"))
    priced = {name: {"litellm_provider": "hosted_vllm", "mode": "chat"} | free for name in names}
    litellm.register_model({name: price for name, price in priced.items() if name not in litellm.model_cost})


def is_listed(model: str, router: Router | None = None) -> bool:
    """Whether the owner's config answers to ``model``, other than by our deployment: a deployment by its name or id, an
    alias, a routing group, or a pattern of the owner's.

    An alias or a group that leads to our deployment is none of these: the agent's route decides what answers (law 4).
    """
    router = router or proxy_server.llm_router
    if router is None:
        return False
    target = router.get_model_from_alias(model) or model
    group = router.get_routing_group(target)
    names = {model, target, *(group.models if group is not None else ())}
    if router.has_model_id(model) and (deployment := router.get_deployment(model)) is not None:
        names.add(deployment.model_name)
    if any(name.startswith(f"{UPSTREAM}/") for name in names):
        return False
    return router.is_recognized_model(model) or bool(router.pattern_router.route(model))
