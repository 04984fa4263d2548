"""Agents, and the keys that act for them.

A key is shown once, when it is made; the store holds its sha256 alone, which is enough for a secret of 32 random bytes.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.names import slug
from metaclaw_hooks.types import Agent, Mode
from sqlalchemy.engine import Connection, Row

from metaclaw_plugin.errors import AgentExistsError, UnknownAgentError, UnknownKeyError
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.engine import insert_or_ignore
from metaclaw_plugin.store.facts import get_fact, set_fact

KEY_PREFIX = "mc-"
GLOBAL_MODE = "global_mode"  # fact {"mode"}: set while running, it goes before the configured one
_EVERYONE = sa.select(schema.facts.c.value).where(schema.facts.c.name == GLOBAL_MODE).scalar_subquery()
_AGENTS = sa.select(schema.agents, _EVERYONE.label("everyone"))
_BY_NAME = _AGENTS.where(schema.agents.c.name == sa.bindparam("name"))


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """An agent as the store has it; ``mode`` None: the global mode, ``global_mode`` if that was set while running."""

    name: str
    mode: Mode | None
    skill_generation: int
    record: bool  # False: nothing of its traffic is kept
    settings: Mapping[str, Any]
    owner: str | None  # "team:ID", "user:ID" or "key:HASH" of LiteLLM; None: nobody claimed it
    created_at: float
    global_mode: Mode | None = None

    def agent(self, default: Mode) -> Agent:
        """The agent with its effective mode; ``default`` is the configured one."""
        return Agent(self.name, self.effective_mode(default), self.skill_generation, self.settings)

    def effective_mode(self, default: Mode) -> Mode:
        """The agent's own mode, else the global one that was set while running, else ``default``."""
        return self.mode or self.global_mode or default


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made; ``secret`` is never to be had again."""

    id: str
    secret: str
    hint: str


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as the store has it."""

    id: str
    hint: str
    agents: tuple[str, ...]
    created_at: float
    revoked_at: float | None


@dataclass(frozen=True, slots=True)
class KeyIdentity:
    """Whom a valid key acts for; the first agent is the one taken when no header chooses."""

    key_id: str
    agents: tuple[str, ...]


def add_agent(c: Connection, name: str, mode: Mode | None = None, owner: str | None = None) -> AgentRecord:
    """Add the agent ``name``.

    Raises:
        InvalidNameError: if it is no slug.
        AgentExistsError: if it is there already.
    """
    row: dict[str, Any] = {"name": slug(name), "mode": mode, "settings": {}, "owner": owner, "created_at": time.time()}
    if not insert_or_ignore(c, schema.agents, [row]):
        raise AgentExistsError(f"agent {name!r} is there already; `metaclaw agents list` shows it")
    return get_record(c, name)


def get_record(c: Connection, name: str) -> AgentRecord:
    """The agent ``name``.

    Raises:
        UnknownAgentError: if there is none.
    """
    row = c.execute(_BY_NAME, {"name": name}).one_or_none()
    if row is None:
        raise UnknownAgentError(f"no agent {name[:80]!r}; `metaclaw agents add NAME` adds one")
    return _record(row)


def get_agent(c: Connection, name: str, default: Mode) -> Agent:
    """The agent ``name`` with its effective mode; ``default`` is the global one.

    Raises:
        UnknownAgentError: if there is none.
    """
    return get_record(c, name).agent(default)


def list_agents(c: Connection) -> list[AgentRecord]:
    """All agents, by name."""
    return [_record(row) for row in c.execute(_AGENTS.order_by(schema.agents.c.name))]


def set_mode(c: Connection, name: str, mode: Mode | None) -> None:
    """Set the agent's mode; ``None``: it follows the global one."""
    _update(c, name, mode=mode)


def get_global_mode(c: Connection) -> Mode | None:
    """The mode of agents without one of their own, if it was set while running."""
    found = get_fact(c, GLOBAL_MODE)
    return None if found is None else Mode(found["mode"])


def set_global_mode(c: Connection, mode: Mode | None) -> None:
    """Set the mode of all agents that have none of their own; ``None``: the configured one counts again."""
    if mode is None:
        c.execute(schema.facts.delete().where(schema.facts.c.name == GLOBAL_MODE))
    else:
        set_fact(c, GLOBAL_MODE, {"mode": mode.value})


def set_record(c: Connection, name: str, record: bool) -> None:
    """Whether anything of the agent's traffic is kept."""
    _update(c, name, record=record)


def set_settings(c: Connection, name: str, settings: Mapping[str, Any]) -> None:
    """Replace what the owner set for this agent alone."""
    _update(c, name, settings=dict(settings))


def set_owner(c: Connection, name: str, owner: str | None) -> None:
    """Hand the agent to another LiteLLM owner; ``None``: to whoever claims it next."""
    _update(c, name, owner=owner)


def claim_agent(c: Connection, name: str, owner: str) -> bool:
    """Whether ``owner`` has the agent ``name``: it is new, unclaimed and without keys of ours, or already theirs.

    A name under which something is left of an agent that was removed is not new.

    Raises:
        InvalidNameError: if it is no slug.
    """
    found = c.execute(_BY_NAME, {"name": slug(name)}).one_or_none()
    if found is None:
        if _has_left_something(c, name):
            return False
        row: dict[str, Any] = {"name": name, "mode": None, "settings": {}, "owner": owner, "created_at": time.time()}
        if insert_or_ignore(c, schema.agents, [row]):
            return True
    record = get_record(c, name)  # another process may have been first
    if record.owner is not None or list_keys(c, name):
        return record.owner == owner
    unclaimed = sa.update(schema.agents).where(schema.agents.c.name == name, schema.agents.c.owner.is_(None))
    return c.execute(unclaimed.values(owner=owner)).rowcount == 1


def raise_generation(c: Connection, name: str) -> int:
    """Count one more skill generation of the agent; returns the new one."""
    _update(c, name, skill_generation=schema.agents.c.skill_generation + 1)
    return get_record(c, name).skill_generation


def remove_agent(c: Connection, name: str) -> int:
    """Remove the agent, its route, and the keys that acted for it alone; returns how many keys that were.

    Its traces stay until they are deleted by name.

    Raises:
        UnknownAgentError: if there is none.
    """
    get_record(c, name)
    ids = sa.select(schema.key_agents.c.key_id).where(schema.key_agents.c.agent == name)
    shared = sa.select(schema.key_agents.c.key_id).where(schema.key_agents.c.agent != name)
    own = sa.delete(schema.keys).where(schema.keys.c.id.in_(ids), schema.keys.c.id.not_in(shared))
    removed = c.execute(own).rowcount
    c.execute(sa.delete(schema.key_agents).where(schema.key_agents.c.agent == name))
    c.execute(sa.delete(schema.routes).where(schema.routes.c.agent == name))
    c.execute(sa.delete(schema.last_requests).where(schema.last_requests.c.agent == name))
    c.execute(sa.delete(schema.agents).where(schema.agents.c.name == name))
    return removed


def new_key(c: Connection, agents: Sequence[str]) -> NewKey:
    """Make a key that acts for ``agents``, the first by default.

    Raises:
        UnknownAgentError: if one of them is not there, or none is named.
    """
    if not agents:
        raise UnknownAgentError("a key acts for at least one agent; name it")
    for name in agents:
        get_record(c, name)
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    key = NewKey(secrets.token_hex(8), secret, secret[-4:])
    row = {"id": key.id, "hash": hash_key(secret), "hint": key.hint, "created_at": time.time()}
    c.execute(sa.insert(schema.keys).values(**row))
    places = [{"key_id": key.id, "agent": name, "position": place} for place, name in enumerate(dict.fromkeys(agents))]
    c.execute(sa.insert(schema.key_agents), places)
    return key


def revoke_key(c: Connection, key_id: str) -> None:
    """The key is refused from now on.

    Raises:
        UnknownKeyError: if there is no such key.
    """
    revoked = sa.func.coalesce(schema.keys.c.revoked_at, time.time())
    if not c.execute(sa.update(schema.keys).where(schema.keys.c.id == key_id).values(revoked_at=revoked)).rowcount:
        raise UnknownKeyError(f"no key {key_id[:80]!r}; `metaclaw agents keys NAME` lists them")


def rotate_key(c: Connection, key_id: str) -> NewKey:
    """Make a new key for the same agents and revoke this one.

    Raises:
        UnknownKeyError: if there is no such key, or it is revoked already.
    """
    query = sa.select(schema.key_agents.c.agent).join(schema.keys).order_by(schema.key_agents.c.position)
    agents = c.execute(query.where(schema.keys.c.id == key_id, schema.keys.c.revoked_at.is_(None))).scalars().all()
    if not agents:
        raise UnknownKeyError(f"no valid key {key_id[:80]!r}; `metaclaw agents keys NAME` lists them")
    revoke_key(c, key_id)
    return new_key(c, agents)


def list_keys(c: Connection, agent: str | None = None) -> list[KeyRecord]:
    """Keys that are not revoked, of one agent or all, oldest first."""
    query = (
        sa.select(schema.keys, schema.key_agents.c.agent)
        .join(schema.key_agents, schema.key_agents.c.key_id == schema.keys.c.id)
        .where(schema.keys.c.revoked_at.is_(None))
        .order_by(schema.keys.c.created_at, schema.keys.c.id, schema.key_agents.c.position)
    )
    rows: dict[str, list[Any]] = {}
    for row in c.execute(query):
        rows.setdefault(row.id, []).append(row)
    records = [
        KeyRecord(id_, group[0].hint, tuple(row.agent for row in group), group[0].created_at, group[0].revoked_at)
        for id_, group in rows.items()
    ]
    return [record for record in records if agent is None or agent in record.agents]


def agents_of_key(c: Connection, secret: str) -> KeyIdentity | None:
    """Whom ``secret`` acts for; ``None`` if it is unknown or revoked.

    The lookup is by hash, so its time says nothing about the secret; the hashes are compared in constant time besides.
    """
    digest = hash_key(secret)
    query = (
        sa.select(schema.keys.c.id, schema.keys.c.hash, schema.key_agents.c.agent)
        .join(schema.key_agents, schema.key_agents.c.key_id == schema.keys.c.id)
        .where(schema.keys.c.hash == digest, schema.keys.c.revoked_at.is_(None))
        .order_by(schema.key_agents.c.position)
    )
    rows = c.execute(query).all()
    if not rows or not secrets.compare_digest(rows[0].hash, digest):
        return None
    return KeyIdentity(rows[0].id, tuple(row.agent for row in rows))


def hash_key(secret: str) -> str:
    """sha256 of the key, hex: 64 characters."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _record(row: Row[Any]) -> AgentRecord:
    mode = None if row.mode is None else Mode(row.mode)
    everyone = None if row.everyone is None else Mode(row.everyone["mode"])
    return AgentRecord(
        row.name, mode, row.skill_generation, row.record, row.settings, row.owner, row.created_at, everyone
    )


def _has_left_something(c: Connection, name: str) -> bool:
    tables = (schema.traces, schema.sessions, schema.adapters)
    return any(c.execute(sa.select(sa.literal(1)).where(t.c.agent == name).limit(1)).first() for t in tables)


def _update(c: Connection, name: str, **values: Any) -> None:
    if not c.execute(sa.update(schema.agents).where(schema.agents.c.name == name).values(**values)).rowcount:
        get_record(c, name)
