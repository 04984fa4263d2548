"""The owner's word about adapter versions: promote, and roll back. The worker carries it out.

Every function takes a connection of ``engine.begin()``, never commits, and returns one line that says what will happen.
What vLLM holds already takes the route at once; anything else becomes a candidate that needs no judging. A new word
replaces one that still waits to be carried out.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from metaclaw_hooks.names import version_name
from metaclaw_hooks.types import BASE_VERSION, VersionState

from metaclaw_plugin.errors import VersionStateError
from metaclaw_plugin.store.adapters import (
    WISH_SERVE,
    WISH_WITHDRAW,
    VersionRecord,
    end_canary,
    get_route,
    get_version,
    list_versions,
    set_head,
    set_route,
    set_state,
    update_version,
)
from metaclaw_plugin.store.deciding import lock_agent
from metaclaw_plugin.store.schema import adapters, routes
from metaclaw_plugin.store.withdrawal import withdraw


def promote(c: sa.Connection, agent: str, number: int) -> str:
    """Let a version serve, whatever was decided about it; training goes on from it.

    Raises:
        UnknownVersionError: if there is no such version.
    """
    lock_agent(c, agent)
    drop_wish(c, agent)
    record = get_version(c, agent, number)
    if not record.routed:
        return put_in_place(c, agent, number)
    if record.withdrawn:
        _accept(c, record)
    return f"{record.version.name} is serving already"


def rollback(c: sa.Connection, agent: str, to: int | None = None) -> str:
    """Take back the version that serves: the one before it, or ``to`` (0: the base model), serves again.

    A canary on trial is taken back with it, unless it is ``to``; without ``to`` it is the canary alone that is taken
    back. Training goes on from what serves then, and what is taken back, or was trained from it, never serves by itself
    again.

    Raises:
        UnknownVersionError: if ``to`` does not exist.
        VersionStateError: if the base model is serving, or ``to`` is what serves.
    """
    lock_agent(c, agent)
    route = get_route(c, agent)
    current = route.version
    if route.canary is not None and to is None:
        return _end_trial(c, agent, route.canary, current)
    if current == BASE_VERSION:
        raise VersionStateError(f"the base model is serving {agent!r}: there is nothing to take back")
    drop_wish(c, agent)
    target = version_before(c, agent) if to is None else to
    if target == current:
        raise VersionStateError(f"{version_name(agent, current)} is what serves; name an earlier version")
    if target != BASE_VERSION:
        get_version(c, agent, target)
    instead = f"v{target}" if target else "the base model"
    if route.canary not in (None, target):
        end_canary(c, agent)
        withdraw(c, agent, route.canary, f"v{route.canary}: its trial was ended by the owner", spare=target)
    withdraw(c, agent, current, f"v{current}: taken back by the owner for {instead}", spare=target)
    return put_in_place(c, agent, target)


def put_in_place(c: sa.Connection, agent: str, number: int) -> str:
    """Let version ``number`` (0: the base model) serve: at once if vLLM holds it, else as soon as it does.

    Raises:
        UnknownVersionError: if there is no such version.
    """
    if number == BASE_VERSION:
        set_route(c, agent, BASE_VERSION, head=BASE_VERSION)
        return f"the base model serves {agent} now"
    record = get_version(c, agent, number)
    name, state = record.version.name, record.version.state
    if state is VersionState.SERVING:  # still loaded, as it drains
        _accept(c, record)
        update_version(c, agent, number, announced_at=None)
        set_route(c, agent, number, head=number)
        return f"{name} serves now"
    set_state(c, agent, number, VersionState.CANDIDATE)
    update_version(c, agent, number, wish=WISH_SERVE, wished_from=state.value)
    return f"{name} will serve as soon as vLLM has loaded it; until then nothing changes"


def drop_wish(c: sa.Connection, agent: str) -> None:
    """Drop the wish that a version shall serve, if one still waits; the version is again what it was."""
    for record in list_versions(c, agent, states=(VersionState.CANDIDATE,)):
        if record.wish is None:
            continue
        rejected = record.wished_from is VersionState.REJECTED
        set_state(c, agent, record.version.number, VersionState.REJECTED if rejected else VersionState.RETIRED)
        update_version(c, agent, record.version.number, wish=None, wished_from=None)


def version_before(c: sa.Connection, agent: str, without: Collection[int] = ()) -> int:
    """What was on the route before the version that is; 0: the base model. See ``versions_before``."""
    return versions_before(c, agent, without).get(agent, BASE_VERSION)


def versions_before(c: sa.Connection, agent: str | None = None, without: Collection[int] = ()) -> dict[str, int]:
    """What ``rollback`` goes back to, by agent; no entry: the base model.

    It is the version that had the route last before the one that has it; those that were taken back, and those
    ``without``, are passed over. The base model counts where the owner went back to it.
    """
    current, earlier = adapters.alias("current"), adapters.alias("earlier")
    held = (VersionState.SERVING.value, VersionState.RETIRED.value)
    newest = (
        sa.select(earlier.c.number)
        .where(
            earlier.c.agent == current.c.agent,
            earlier.c.served_at < current.c.served_at,
            earlier.c.served_at > sa.func.coalesce(routes.c.base_at, 0.0),
            earlier.c.state.in_(held),
            sa.func.coalesce(earlier.c.wish, "") != WISH_WITHDRAW,
            earlier.c.number.not_in(without),
        )
        .order_by(earlier.c.served_at.desc())
        .limit(1)
        .correlate(current, routes)
        .scalar_subquery()
    )
    on_route = sa.and_(current.c.agent == routes.c.agent, current.c.number == routes.c.version)
    query = sa.select(routes.c.agent, newest.label("number")).join(current, on_route)
    if agent is not None:
        query = query.where(routes.c.agent == agent)
    return {row.agent: row.number for row in c.execute(query) if row.number is not None}


def _end_trial(c: sa.Connection, agent: str, canary: int, serving: int) -> str:
    drop_wish(c, agent)
    end_canary(c, agent)
    set_head(c, agent, serving)
    withdraw(c, agent, canary, f"v{canary}: its trial was ended by the owner")
    return f"the trial of {version_name(agent, canary)} is ended; what serves goes on"


def _accept(c: sa.Connection, record: VersionRecord) -> None:
    """Note that the owner wants a serving version, even one that was taken back."""
    version = record.version
    sentence = f"v{version.number}: put in place by the owner"
    decision = dict(record.decision or {}) | {"accepted": True, "sentence": sentence, "policy": "owner"}
    set_state(c, version.agent, version.number, VersionState.SERVING, decision)
    update_version(c, version.agent, version.number, wish=None)
