"""What LiteLLM's hooks mean to us, and how the edge gets around LiteLLM's application."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any

from fastapi import Depends, HTTPException, Response
from litellm.proxy import proxy_server
from litellm.proxy._types import LitellmUserRoles
from litellm.proxy.auth.auth_utils import request_fallback_model_names
from litellm.proxy.auth.user_api_key_auth import user_api_key_auth

from metaclaw_plugin.errors import ForbiddenAgentError, MetaclawError, UnknownAgentError
from metaclaw_plugin.gateway import routes
from metaclaw_plugin.gateway.auth import standing
from metaclaw_plugin.gateway.current import CURRENT, CurrentRequest
from metaclaw_plugin.gateway.dialects import CALL_TYPES
from metaclaw_plugin.gateway.edge import Edge
from metaclaw_plugin.gateway.identity import CLAIM, MODEL_PREFIX, KeyFacts
from metaclaw_plugin.gateway.limits import too_many
from metaclaw_plugin.gateway.reach import forbidden_model, names_adapter
from metaclaw_plugin.gateway.routing import BASE_MODEL_NAME
from metaclaw_plugin.gateway.runtime import process_gateway
from metaclaw_plugin.gateway.upstream import ask_for_usage, give_price, is_listed, tapped_client

logger = logging.getLogger(__name__)


def install() -> None:
    """Put the edge around LiteLLM's application and our routes into it, once.

    LiteLLM loads callbacks while its application starts, when it takes no more middleware; so the edge goes around the
    stack of middleware that is there.
    """
    app = proxy_server.app
    if app.middleware_stack is None:
        app.middleware_stack = app.build_middleware_stack()
    if not isinstance(app.middleware_stack, Edge):
        app.middleware_stack = Edge(app.middleware_stack, process_gateway(), standing)
        routes.mount(app)
        app.add_api_route("/metaclaw/metrics", metrics, methods=["GET"], tags=["metaclaw"])
        # What LiteLLM has loaded by now stays: without this, the collector goes through all of it every so often, and
        # every request in flight waits for a second or so.
        gc.collect()
        gc.freeze()


async def metrics(auth: Any = Depends(user_api_key_auth)) -> Response:
    """What the gateway counts, for Prometheus: to LiteLLM's admins and the key in ``internal.key``.

    Raises:
        HTTPException: 403 for any other key, since agents of all owners are named.
    """
    claim = KeyFacts.of(auth)
    internal = claim.ours and claim.metadata.get(CLAIM, {}).get("internal") is True
    if not internal and not _is_admin(auth):
        raise HTTPException(403, "metrics are for LiteLLM's admins, and for the key in METACLAW_HOME/internal.key")
    page = await asyncio.to_thread(process_gateway().metrics.render)
    return Response(page, media_type="text/plain; version=0.0.4; charset=utf-8")


async def before_routing(auth: Any, data: dict[str, Any], call_type: str) -> dict[str, Any]:
    """Prepare a request for a model's answer; others pass as they are.

    Raises:
        HTTPException: 403 for an agent that the key does not act for, 404 for one that is gone, 413 past a limit.
    """
    current = CURRENT.get()
    routed = current is not None and CALL_TYPES.get(call_type) == current.dialect
    if complaint := forbidden_model(data, request_fallback_model_names(data), routed):
        raise HTTPException(403, complaint)
    model = data.get("model")
    listed = isinstance(model, str) and is_listed(model)
    if call_type == "moderation" and not listed and not _is_admin(auth):
        # LiteLLM would ask OpenAI itself, with the key of the owner's environment.
        raise HTTPException(403, f"no deployment of this gateway is called {str(model)[:80]!r}: see /v1/models")
    if current is None or not routed or current.plan is not None:
        return data
    gateway = process_gateway()
    if complaint := too_many(data, gateway.settings.gateway):
        raise HTTPException(413, complaint)
    current.named = model if listed else None
    try:
        await gateway.prepare(current, KeyFacts.of(auth), data, listed)
    except ForbiddenAgentError as error:
        raise HTTPException(403, str(error)) from error
    except UnknownAgentError as error:
        raise HTTPException(404, str(error)) from error
    except (MetaclawError, TimeoutError) as error:
        logger.error("a request could not be prepared: %s", error)
        raise HTTPException(503, "the gateway cannot take this request just now; try again") from error
    if current.plan is not None and current.plan.on_own_model:
        give_price(current.plan.agent.name, current.plan.upstream_name)
    if current.dialect == "chat" and data.get("model") != model:
        ask_for_usage(data)
    return data


def before_attempt(call: dict[str, Any], call_type: Any) -> dict[str, Any] | None:
    """Make a call to vLLM recordable, give the caller's own key to what it named; ``None``: leave the call as it is.

    Raises:
        HTTPException: 403 if it goes to an agent's adapter and nothing decided that it may.
    """
    current = CURRENT.get()
    groups = _groups(call)
    _refuse_unrouted(call, groups, current)
    if current is None:
        return None
    # A fallback is another group: the caller gave no key for it.
    own = {} if current.upstream_key is None or groups != {current.named} else {"api_key": current.upstream_key}
    vllm = call.get("custom_llm_provider") == "hosted_vllm" or str(call.get("model")).startswith("hosted_vllm/")
    if vllm and current.plan is not None and getattr(call_type, "value", call_type) == "acompletion":
        return process_gateway().attempt(current, call) | {"client": tapped_client()} | own
    return call | own | {"client": None} if own else None  # LiteLLM's client would bring our key


def _groups(call: dict[str, Any]) -> set[str]:
    """The deployment group that LiteLLM's router chose, and whatever else a client may have written in its place."""
    found = [call.get("metadata"), call.get("litellm_metadata")]
    groups = [part.get("model_group") for part in found if isinstance(part, dict)]
    return {group for group in groups if isinstance(group, str)}


def _refuse_unrouted(call: dict[str, Any], groups: set[str], current: CurrentRequest | None) -> None:
    """The last wall before vLLM: some routes of LiteLLM reach a deployment without asking any hook before (law 4)."""
    planned = current is not None and current.plan is not None and current.plan.on_own_model
    for asked in groups or {str(call.get("model"))}:
        if not names_adapter(asked):
            continue
        base = asked == MODEL_PREFIX + BASE_MODEL_NAME  # nobody's, so that an owner may name it as a fallback
        if not asked.startswith(MODEL_PREFIX) or not (planned or (base and current is not None)):
            raise HTTPException(403, f"no request may choose {asked[:80]!r} past its agent")


def _is_admin(auth: Any) -> bool:
    return bool(getattr(auth, "user_role", None) == LitellmUserRoles.PROXY_ADMIN)


def with_answer(response: Any) -> None:
    """Note the id of an answer that comes in one piece."""
    current = CURRENT.get()
    if current is None:
        return
    found = response.get("id") if isinstance(response, dict) else getattr(response, "id", None)
    if isinstance(found, str):
        current.response_id = found
