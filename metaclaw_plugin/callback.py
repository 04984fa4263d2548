"""LiteLLM's hook methods, each one call into the gateway. No state: LiteLLM executes this file by its path.

Listed once in the config: ``litellm_settings.callbacks: metaclaw_plugin.callback.handler``.
"""

from __future__ import annotations

from typing import Any

from litellm.integrations.custom_logger import CustomLogger

from metaclaw_plugin.gateway import proxy_hooks


class MetaclawCallback(CustomLogger):  # type: ignore[misc]
    """Hands every request that LiteLLM handles to ``metaclaw_plugin.gateway``."""

    async def async_pre_call_hook(
        self,
        user_api_key_dict: Any,
        cache: Any,  # noqa: ARG002 - LiteLLM's signature
        data: dict[str, Any],
        call_type: str,
    ) -> Any:
        """Before LiteLLM routes: whose request it is, its session, skills and adapter version."""
        return await proxy_hooks.before_routing(user_api_key_dict, data, call_type)

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> dict[str, Any] | None:
        """Before each attempt to reach a deployment: put the tap in."""
        return proxy_hooks.before_attempt(kwargs, call_type)

    async def async_post_call_response_headers_hook(
        self,
        data: Any,  # noqa: ARG002 - LiteLLM's signature
        user_api_key_dict: Any,  # noqa: ARG002
        response: Any,
        **_: Any,
    ) -> None:
        """When LiteLLM has its answer: the id that the client will see."""
        proxy_hooks.with_answer(response)


proxy_hooks.install()
handler = MetaclawCallback()
