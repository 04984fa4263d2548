"""LiteLLM's custom authentication: ``general_settings.custom_auth: metaclaw_plugin.gateway.auth.authenticate``."""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Any

from fastapi import Request
from litellm.proxy._types import LitellmUserRoles, ProxyException, UserAPIKeyAuth
from litellm.proxy.auth.auth_utils import get_request_route
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.errors import MetaclawError
from metaclaw_plugin.gateway.dialects import dialect_of
from metaclaw_plugin.gateway.identity import CLAIM, internal_key
from metaclaw_plugin.gateway.keys import FRESH, KeyCache
from metaclaw_plugin.gateway.process import this_process
from metaclaw_plugin.gateway.reach import is_open
from metaclaw_plugin.store.agents import hash_key

logger = logging.getLogger(__name__)

_caches: dict[int, KeyCache] = {}


async def authenticate(request: Request, api_key: str | None) -> UserAPIKeyAuth:
    """Who calls.

    Raises:
        ProxyException: 401 for a missing, unknown or revoked key; 403 for a route that is for admins; 503 if the store
            does not answer.
    """
    if not api_key:
        raise _refusal(request, "no API key given: send it as 'Authorization: Bearer KEY'")
    try:
        found = await _authenticate(api_key)
    except (SQLAlchemyError, MetaclawError, TimeoutError) as error:
        logger.error("keys cannot be checked: %s", type(error).__name__)
        raise _unavailable(request) from error
    if found is None:
        raise _refusal(request, "this API key is unknown or revoked; `metaclaw agents add NAME` makes one")
    _refuse_closed_routes(request, found)
    return found


async def _authenticate(api_key: str) -> UserAPIKeyAuth | None:
    identity = await _cache().look_up(api_key)
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


def _cache() -> KeyCache:
    process = this_process()
    if id(process.engine) not in _caches:
        _caches[id(process.engine)] = KeyCache(process.engine, process.settings.gateway.commit_timeout)
    return _caches[id(process.engine)]


def _master_key() -> str | None:
    from litellm.proxy import proxy_server

    key = proxy_server.master_key
    return key if isinstance(key, str) and key else None


def _refuse_closed_routes(request: Request, auth: UserAPIKeyAuth) -> None:
    """Raise a 403 unless the key may call what it calls; LiteLLM itself asks nothing of keys that pass here."""
    route = get_request_route(request)
    if auth.user_role == LitellmUserRoles.PROXY_ADMIN or is_open(route, this_process().settings.gateway.open_routes):
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
