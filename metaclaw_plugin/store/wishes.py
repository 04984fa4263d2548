"""The owner's word about adapter versions: promote, and roll back. The worker carries it out.

Every function takes a connection of ``engine.begin()``, never commits, and returns one line that says what will happen.
What vLLM holds already takes the route at once; anything else becomes a candidate that needs no judging.
"""

from __future__ import annotations

import sqlalchemy as sa
from metaclaw_hooks.names import version_name
from metaclaw_hooks.types import BASE_VERSION, VersionState

from metaclaw_plugin.errors import UnknownVersionError, VersionStateError
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


def promote(c: sa.Connection, agent: str, number: int) -> str:
    """Let a version serve, whatever was decided about it; training goes on from it.

    Raises:
        UnknownVersionError: if there is no such version.
    """
    record = get_version(c, agent, number)
    _drop_wishes(c, agent)
    if record.routed:
        return f"{record.version.name} is serving already"
    return _put_in_place(c, record)


def rollback(c: sa.Connection, agent: str, to: int | None = None) -> str:
    """Take back the version that serves: the one before it, or ``to`` (0: the base model), serves again.

    While a canary is on trial and ``to`` is not given, it is the canary that is taken back.

    Training goes on from there, and what is taken back, or was trained from it, never serves by itself again.

    Raises:
        UnknownVersionError: if ``to`` does not exist.
        VersionStateError: if the base model is serving, or ``to`` is what serves.
    """
    route = get_route(c, agent)
    current = route.version
    if route.canary is not None and to is None:
        return _end_trial(c, agent, route.canary, current)
    if current == BASE_VERSION:
        raise VersionStateError(f"the base model is serving {agent!r}: there is nothing to take back")
    target = _before(c, agent, current) if to is None else to
    if target == current:
        raise VersionStateError(f"{version_name(agent, current)} is what serves; name an earlier version")
    record = None if target == BASE_VERSION else get_version(c, agent, target)
    _drop_wishes(c, agent)
    instead = "the base model" if record is None else f"v{target}"
    _withdraw(c, agent, current, f"v{current}: taken back by the owner for {instead}")
    if record is None:
        set_route(c, agent, BASE_VERSION, head=BASE_VERSION)
        return f"the base model serves {agent} now"
    return _put_in_place(c, record)


def _end_trial(c: sa.Connection, agent: str, canary: int, serving: int) -> str:
    end_canary(c, agent)
    set_head(c, agent, serving)
    _withdraw(c, agent, canary, f"v{canary}: its trial was ended by the owner")
    return f"the trial of {version_name(agent, canary)} is ended; what serves goes on"


def _withdraw(c: sa.Connection, agent: str, number: int, sentence: str) -> None:
    decision = dict(get_version(c, agent, number).decision or {}) | {"accepted": False, "sentence": sentence}
    update_version(c, agent, number, wish=WISH_WITHDRAW, decision=decision)


def _put_in_place(c: sa.Connection, record: VersionRecord) -> str:
    version = record.version
    if version.state is VersionState.SERVING:  # still loaded, as it drains
        update_version(c, version.agent, version.number, wish=None, announced_at=None)
        set_route(c, version.agent, version.number, head=version.number)
        return f"{version.name} serves now"
    if version.state is not VersionState.CANDIDATE:
        set_state(c, version.agent, version.number, VersionState.CANDIDATE)
    update_version(c, version.agent, version.number, wish=WISH_SERVE)
    return f"{version.name} will serve as soon as vLLM has loaded it; until then nothing changes"


def _drop_wishes(c: sa.Connection, agent: str) -> None:
    for record in list_versions(c, agent):
        if record.wish is None:
            continue
        number = record.version.number
        update_version(c, agent, number, wish=None)
        if record.version.state is VersionState.CANDIDATE:
            set_state(c, agent, number, VersionState.RETIRED)


def _before(c: sa.Connection, agent: str, current: int) -> int:
    """The version that served before ``current`` and was not taken back; 0 if there was none."""
    records = {record.version.number: record for record in list_versions(c, agent)}
    if current not in records:
        raise UnknownVersionError(f"agent {agent!r} is routed to version {current}, which the store does not know")
    since = records[current].decided_at or 0.0
    served = [
        (record.decided_at, number)
        for number, record in records.items()
        if record.decided_at is not None
        and record.decided_at < since
        and (record.decision or {}).get("accepted")
        and record.wish != WISH_WITHDRAW
        and record.version.state in (VersionState.SERVING, VersionState.RETIRED)
    ]
    return max(served)[1] if served else BASE_VERSION
