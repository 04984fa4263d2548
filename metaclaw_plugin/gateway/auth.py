"""LiteLLM's custom authentication: ``general_settings.custom_auth: metaclaw_plugin.gateway.auth.authenticate``."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping, MutableMapping
from typing import Any

from fastapi import Request
from litellm.proxy._types import LitellmUserRoles, ProxyException, UserAPIKeyAuth
from litellm.proxy.auth.auth_utils import get_request_route
from litellm.proxy.auth.user_api_key_auth import get_api_key, get_api_key_from_custom_header
from litellm.types.proxy.auth.special_headers import SpecialHeaders
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.errors import MetaclawError
from metaclaw_plugin.gateway.bodies import REFUSED, Standing
from metaclaw_plugin.gateway.dialects import dialect_of
from metaclaw_plugin.gateway.identity import CLAIM, internal_key
from metaclaw_plugin.gateway.keys import FRESH, key_cache
from metaclaw_plugin.gateway.process import this_process
from metaclaw_plugin.gateway.reach import answers_agents, is_open, is_opened
from metaclaw_plugin.store.agents import hash_key

logger = logging.getLogger(__name__)


async def authenticate(request: Request, api_key: str | None) -> UserAPIKeyAuth:
    """Who calls.

    Raises:
        ProxyException: 401 for a missing, unknown or revoked key; 403 for a route that is for admins; 503 if the store
            does not answer.
    """
    if not api_key:
        raise _refusal(request, "no API key given: send it as 'Authorization: Bearer KEY'")
    try:
        found = None if request.scope.get(REFUSED) else await _authenticate(api_key)
    except (SQLAlchemyError, MetaclawError, TimeoutError) as error:
        logger.error("keys cannot be checked: %s", type(error).__name__)
        raise _unavailable(request) from error
    if found is None:
        raise _refusal(request, "this API key is unknown or revoked; `metaclaw agents add NAME` makes one")
    _refuse_closed_routes(request, found)
    return found


async def standing(scope: MutableMapping[str, Any]) -> Standing:
    """What the key of a request is worth whose body is still arriving, by the scope of the request.

    LiteLLM's own virtual keys are in its database, so there it counts that there is one. While keys cannot be checked
    it counts as known: it is asked again once the body is there, and answered 503 then.
    """
    from litellm.proxy import proxy_server

    key = _key_of(Request(scope), proxy_server.general_settings)
    custom = proxy_server.user_custom_auth
    if custom is None:
        return "known" if key or proxy_server.master_key is None else "stranger"
    # By name, since LiteLLM may have executed this file by its path, beside the module that the edge imports.
    if (custom.__module__, custom.__name__) != (authenticate.__module__, authenticate.__name__):
        return "known"  # by a check that we know nothing of
    try:
        return "known" if key and await _authenticate(key) is not None else "refused"
    except (SQLAlchemyError, MetaclawError, TimeoutError) as error:
        logger.error("keys cannot be checked: %s", type(error).__name__)
        return "known"


def _key_of(request: Request, general: Mapping[str, Any]) -> str:
    """The key as LiteLLM takes it from a request, before it asks whoever authenticates."""
    if (own_header := general.get("litellm_key_header_name")) is not None:
        return str(get_api_key_from_custom_header(request, own_header))
    names = SpecialHeaders
    sent = {name: request.headers.get(name.value) or None for name in names}
    found, _ = get_api_key(
        custom_litellm_key_header=sent[names.custom_litellm_api_key],
        api_key=sent[names.openai_authorization],
        azure_api_key_header=sent[names.azure_authorization],
        anthropic_api_key_header=sent[names.anthropic_authorization],
        google_ai_studio_api_key_header=sent[names.google_ai_studio_authorization],
        azure_apim_header=sent[names.azure_apim_authorization],
        pass_through_endpoints=general.get("pass_through_endpoints"),
        route=get_request_route(request),
        request=request,
    )
    return found or ""


async def _authenticate(api_key: str) -> UserAPIKeyAuth | None:
    process = this_process()
    identity = await key_cache(process.engine, process.settings.gateway.commit_timeout).look_up(api_key)
    digest = hash_key(api_key)
    if identity is not None:
        claim: dict[str, Any] = {"key": identity.key_id, "agents": list(identity.agents)}
        return UserAPIKeyAuth(api_key=digest, key_alias=identity.agents[0], metadata={CLAIM: claim})
    home = this_process().settings.home
    if secrets.compare_digest(digest, hash_key(await asyncio.to_thread(internal_key, home))):
        return UserAPIKeyAuth(api_key=digest, key_alias="metaclaw-internal", metadata={CLAIM: {"internal": True}})
    master = _master_key()
    if master is not None and secrets.compare_digest(digest, hash_key(master)):
        return UserAPIKeyAuth(api_key=digest, user_role=LitellmUserRoles.PROXY_ADMIN)
    return None


def _master_key() -> str | None:
    from litellm.proxy import proxy_server

    key = proxy_server.master_key
    return key if isinstance(key, str) and key else None


def _refuse_closed_routes(request: Request, auth: UserAPIKeyAuth) -> None:
    """Raise a 403 unless the key may call what it calls; LiteLLM itself asks nothing of keys that pass here."""
    if auth.user_role == LitellmUserRoles.PROXY_ADMIN:
        return
    route = get_request_route(request)
    if is_open(request.method, route) and answers_agents(request.scope.get("endpoint")):
        return
    if is_opened(route, this_process().settings.gateway.open_routes):
        return
    message = (
        f"{route[:80]!r} is not for agents' keys: LiteLLM's master key opens it, or "
        "metaclaw.gateway.open_routes in the gateway's config"
    )
    raise ProxyException(message=message, type="permission_error", param=None, code=403)


def _unavailable(request: Request) -> ProxyException:
    """503 with the type that the caller's dialect has for it; the official clients come again by themselves."""
    kind = "api_error" if dialect_of(request.url.path) == "messages" else "server_error"
    message = "the gateway cannot check keys just now: its store does not answer; try again"
    return ProxyException(message=message, type=kind, param=None, code=503, headers={"retry-after": str(round(FRESH))})


def _refusal(request: Request, message: str) -> ProxyException:
    """401 with the type that the caller's dialect has for it."""
    kind = "authentication_error" if dialect_of(request.url.path) == "messages" else "invalid_request_error"
    return ProxyException(message=message, type=kind, param=None, code=401, openai_code="invalid_api_key")
