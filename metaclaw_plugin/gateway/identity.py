"""Key -> agents. Headers choose among them and never widen them (law 4)."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sqlalchemy.engine import Connection

from metaclaw_plugin.errors import ForbiddenAgentError, StoreError
from metaclaw_plugin.store.agents import claim_agent

CLAIM = "metaclaw"  # in a key's metadata: what our own authentication found out
AGENT_HEADER = "x-agent-id"
MODEL_PREFIX = "metaclaw/"

_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_MAX_POOL = 256  # agents that one virtual key may name


@dataclass(frozen=True, slots=True)
class KeyFacts:
    """What LiteLLM says about the key of a request."""

    ours: bool  # it passed our own authentication, so that its metadata are ours too
    metadata: Mapping[str, Any]
    alias: str | None = None
    user_id: str | None = None
    team_id: str | None = None
    token: str | None = None  # LiteLLM's hash of the key

    @classmethod
    def of(cls, auth: Any) -> KeyFacts:
        """From LiteLLM's ``UserAPIKeyAuth``."""
        metadata = getattr(auth, "metadata", None)
        return cls(
            ours=getattr(auth, "authenticated_by_custom_auth", False) is True,
            metadata=metadata if isinstance(metadata, Mapping) else {},
            alias=getattr(auth, "key_alias", None),
            user_id=getattr(auth, "user_id", None),
            team_id=getattr(auth, "team_id", None),
            token=getattr(auth, "token", None),
        )

    @property
    def owner(self) -> str | None:
        """The LiteLLM team, user or key that an agent claimed with this key belongs to."""
        for kind, value in (("team", self.team_id), ("user", self.user_id), ("key", self.token)):
            if value:
                return f"{kind}:{value}"[:400]
        return None

    @property
    def decisive(self) -> tuple[str, str | None]:
        """All that decides whom a virtual key acts for."""
        return repr(named_agents(self)), self.owner


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a request may act for."""

    agents: tuple[str, ...] = ()  # the first one when nothing chooses; none: pass through
    internal: bool = False  # our own judge, evolver or replay: neither injected nor captured
    refused: tuple[str, ...] = ()  # agents that the key names and another owner has


def own_identity(key: KeyFacts) -> Identity:
    """Whom a key that passed our own authentication acts for; nobody, if it is none of ours."""
    claim = key.metadata.get(CLAIM) if key.ours else None
    if not isinstance(claim, Mapping):
        return Identity()
    return Identity(tuple(claim.get("agents") or ()), internal=claim.get("internal") is True)


def identify(c: Connection, key: KeyFacts) -> Identity:
    """The agents that ``key`` acts for. A virtual key claims an agent that nobody has: ``c`` must be a writing one."""
    if key.ours:
        return own_identity(key)
    named = named_agents(key)
    if not named or key.owner is None:
        return Identity()
    owned = {name: claim_agent(c, name, key.owner) for name in named}
    agents = tuple(name for name, mine in owned.items() if mine)
    return Identity(agents, refused=tuple(name for name, mine in owned.items() if not mine))


def named_agents(key: KeyFacts) -> list[str]:
    """The agents that a virtual key names, whoever owns them: those in ``metadata.agent_id``, else its alias."""
    named = key.metadata.get("agent_id")
    if named is None:
        named = key.alias
    names = named if isinstance(named, list) else [named]
    return [name for name in names[:_MAX_POOL] if isinstance(name, str) and _SLUG.fullmatch(name)]


def choose_agent(identity: Identity, headers: Mapping[str, str], model: str | None = None) -> str | None:
    """The agent of a request: ``x-agent-id``, else that of the model ``metaclaw/<agent>``, else the key's first.

    ``None``: the request is nobody's, and passes through.

    Raises:
        ForbiddenAgentError: if the key does not act for the agent that is named.
    """
    if identity.internal:
        return None
    named = headers.get(AGENT_HEADER, "").strip() or None
    asked = model.removeprefix(MODEL_PREFIX) if isinstance(model, str) and model.startswith(MODEL_PREFIX) else None
    for name in (named, asked):
        if name is not None and name not in identity.agents:
            yours = ", ".join(identity.agents) or "none"
            raise ForbiddenAgentError(f"this key does not act for agent {name[:80]!r}; its agents: {yours}")
    if named is not None and asked is not None and named != asked:
        raise ForbiddenAgentError(f"x-agent-id says {named!r}, the model says {asked!r}; send one of them")
    if identity.refused and not identity.agents:
        raise ForbiddenAgentError(
            f"agent {identity.refused[0]!r} belongs to another owner, or did; an admin may hand it over with "
            f"`metaclaw agents owner {identity.refused[0]} OWNER` (add it first if it was removed)"
        )
    return named or asked or (identity.agents[0] if identity.agents else None)


def narrow(identity: Identity, headers: Mapping[str, str]) -> Identity:
    """``identity``, held to the agent that ``x-agent-id`` names; all of it, if the header names none.

    Raises:
        ForbiddenAgentError: if the key does not act for that agent.
    """
    agent = choose_agent(identity, headers) if headers.get(AGENT_HEADER, "").strip() else None
    return identity if agent is None else replace(identity, agents=(agent,))


def own_models(identity: Identity) -> list[str]:
    """Names under which the caller's own agents are listed as models."""
    return [MODEL_PREFIX + name for name in identity.agents]


def internal_key(home: Path) -> str:
    """The key of our own calls through the gateway, kept in ``home`` for its owner's eyes alone; made if missing.

    Raises:
        StoreError: if it can be neither read nor written.
    """
    path = home / "internal.key"
    try:
        if not path.exists():
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            fresh = home / f".internal.key.{secrets.token_hex(8)}"
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write("mci-" + secrets.token_urlsafe(32))
            try:
                os.link(fresh, path)  # whole, or not there; whoever is first wins
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StoreError(f"cannot keep the internal key in {path}: {error}; check the folder's permissions") from error
