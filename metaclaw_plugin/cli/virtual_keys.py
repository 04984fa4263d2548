"""Agents' keys where LiteLLM has its database: LiteLLM makes them, and they are on its Virtual Keys page."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from metaclaw_plugin.settings import Settings
    from metaclaw_plugin.store.agents import NewKey

USER = "metaclaw"  # LiteLLM's user that the keys of unclaimed agents belong to: an owner's keys all act for its agents


def make_virtual_key(settings: Settings, engine: Engine, agents: Sequence[str]) -> NewKey:
    """A virtual key that acts for ``agents``, the first by default, and belongs to the first one's owner.

    Raises:
        UnknownAgentError: if one of them is not there.
        ForbiddenAgentError: if one of them belongs to someone else than the first does, or to a single key.
        LitellmAdminError: if LiteLLM does not make it.
    """
    import httpx

    from metaclaw_plugin.errors import ForbiddenAgentError, LitellmAdminError
    from metaclaw_plugin.litellm_admin import LitellmAdmin, free_alias
    from metaclaw_plugin.store.agents import NewKey, claim_agent, get_record

    with engine.begin() as c:
        owners = [get_record(c, name).owner for name in agents]
        owner = owners[0] or f"user:{USER}"
        kind, _, whose = owner.partition(":")
        for name in agents:
            if kind == "key" or not claim_agent(c, name, owner):
                raise ForbiddenAgentError(
                    f"{name} belongs to another key or owner, so a key of {owner} could not act for it: hand it over "
                    f"with `metaclaw agents owner {name} user:{USER}`; revoke its keys of `metaclaw agents add` first"
                )

    async def ask() -> NewKey:
        async with httpx.AsyncClient(trust_env=False) as http:
            admin = LitellmAdmin(http, settings)
            taken = {key.alias for key in await admin.virtual_keys() if key.alias}
            made = await admin.new_key(free_alias(agents[0], taken), list(agents), kind, whose)
            return NewKey(made.token, made.secret, made.secret[-4:])

    try:
        return asyncio.run(ask())
    except LitellmAdminError as error:
        raise LitellmAdminError(f"no key was made: {error}; later, `metaclaw agents keys {agents[0]} --new`") from error
