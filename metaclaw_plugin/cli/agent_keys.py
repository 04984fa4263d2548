"""Keys of agents: our own, or, where LiteLLM keeps keys in its database, its virtual keys, on its Virtual Keys page."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine

    from metaclaw_plugin.litellm_admin import LitellmAdmin
    from metaclaw_plugin.settings import Settings
    from metaclaw_plugin.store.agents import NewKey

T = TypeVar("T")

USER = "metaclaw"  # LiteLLM's user that the keys of unclaimed agents belong to: an owner's keys all act for its agents


def make_key(settings: Settings, engine: Engine, agents: Sequence[str]) -> NewKey:
    """A key that acts for ``agents``, the first by default; ask ``check_keys`` before whether one would be taken.

    Raises:
        UnknownAgentError: if one of ``agents`` is not there.
        ForbiddenAgentError: if LiteLLM has the keys, and an agent belongs to somebody who cannot share this one.
        LitellmAdminError: if LiteLLM does not make it.
    """
    from metaclaw_plugin.store.agents import new_key

    if settings.gateway.admin_key:
        return _make_virtual_key(settings, engine, agents)
    with engine.begin() as c:
        return new_key(c, agents)


def check_keys(settings: Settings, config: Path | None) -> None:
    """Raise a ConfigError if LiteLLM would refuse what ``make_key`` makes, and we may not ask it for one of its own."""
    from metaclaw_plugin.doctor.configuration import AUTH, litellm_has_the_keys
    from metaclaw_plugin.errors import ConfigError
    from metaclaw_plugin.settings import find_config, read_config

    path = find_config(config)
    if path is not None and settings.gateway.admin_key is None and litellm_has_the_keys(read_config(path)):
        raise ConfigError(
            f"by {path}, LiteLLM has the keys and would refuse one of ours: set metaclaw.gateway.admin_key, so that we "
            "may ask it for one; or make one on its Virtual Keys page, with the agent as its alias; or set "
            f"general_settings.custom_auth: {AUTH}"
        )


def _make_virtual_key(settings: Settings, engine: Engine, agents: Sequence[str]) -> NewKey:
    """A virtual key that acts for ``agents``, the first by default, and belongs to the first one's owner.

    Raises:
        UnknownAgentError: if one of them is not there.
        ForbiddenAgentError: if one of them belongs to someone else than the first does, or to a single key.
        LitellmAdminError: if LiteLLM does not make it.
    """
    from metaclaw_plugin.errors import ForbiddenAgentError, LitellmAdminError
    from metaclaw_plugin.litellm_admin import free_alias
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

    async def ask(admin: LitellmAdmin) -> NewKey:
        taken = {key.alias for key in await admin.virtual_keys() if key.alias}
        made = await admin.new_key(free_alias(agents[0], taken), list(agents), kind, whose)
        return NewKey(made.token, made.secret, made.secret[-4:])

    try:
        return _asked(settings, ask)
    except LitellmAdminError as error:
        raise LitellmAdminError(f"no key was made: {error}; later, `metaclaw agents keys {agents[0]} --new`") from error


def agents_behind(settings: Settings, engine: Engine, secret: str) -> tuple[str, ...]:
    """Whom a key that somebody has acts for; nobody, if it is unknown or revoked.

    Raises:
        LitellmAdminError: if LiteLLM has the keys and does not answer.
    """
    from metaclaw_plugin.gateway.identity import KeyFacts, named_agents
    from metaclaw_plugin.store.agents import agents_of_key, hash_key

    if not settings.gateway.admin_key:
        with engine.connect() as c:
            found = agents_of_key(c, secret)
        return () if found is None else found.agents
    token = hash_key(secret)  # LiteLLM keeps the same
    keys = _asked(settings, lambda admin: admin.virtual_keys())
    return tuple(
        name
        for key in keys
        if key.token == token
        for name in named_agents(KeyFacts(ours=False, metadata=key.metadata, alias=key.alias))
    )


def _asked(settings: Settings, ask: Callable[[LitellmAdmin], Awaitable[T]]) -> T:
    """What LiteLLM says to ``ask``, by its master key."""
    import httpx

    from metaclaw_plugin.litellm_admin import LitellmAdmin

    async def work() -> T:
        async with httpx.AsyncClient(trust_env=False) as http:
            return await ask(LitellmAdmin(http, settings))

    return asyncio.run(work())
