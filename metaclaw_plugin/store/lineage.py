"""What a version has learned from, and what is to be done when its owner deletes some of that.

A version has learned from a trace if it, or a version that it was trained from, was trained on it. Traces that were
deleted for their age or for room (``store.keep_days``, ``store.keep_bytes``) count for nothing here: nobody wished them
forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence, Set

import sqlalchemy as sa
from metaclaw_hooks.types import AdapterVersion

from metaclaw_plugin.store.adapters import VersionRecord, end_canary, get_route, get_version, list_versions, set_head
from metaclaw_plugin.store.deciding import lock_agent
from metaclaw_plugin.store.deletion import BY_OWNER
from metaclaw_plugin.store.schema import recalls
from metaclaw_plugin.store.wishes import drop_wish, put_in_place, version_before
from metaclaw_plugin.store.withdrawal import take_back

_MANY = 500  # trace ids in one question


def learned_from(c: sa.Connection, agent: str, trace_ids: Set[str]) -> list[int]:
    """Numbers, ascending, of the agent's versions that have learned from one of these traces."""
    return _learned(list_versions(c, agent), trace_ids) if trace_ids else []


def learned_from_deleted(c: sa.Connection, agent: str) -> list[int]:
    """Numbers, ascending, of the agent's versions that have learned from a trace which its owner deleted since."""
    return learned_from(c, agent, set(c.scalars(sa.select(recalls.c.trace_id).where(_by_owner(agent)))))


def retrain_without_deleted(c: sa.Connection, agent: str) -> str:
    """Go back to the version that served last and learned from no deleted trace, and train on from there.

    ``c`` must be of ``engine.begin()``. Returns one line that says what will happen. No version that has learned from a
    deleted trace, even one that the trainer lists later, is chosen by itself again; its weights stay until the
    trainer's disk budget removes them.
    """
    lock_agent(c, agent)
    _leave_out(c, agent)
    tainted = learned_from_deleted(c, agent)
    if all(get_version(c, agent, number).withdrawn for number in tainted):
        return f"no version of {agent} that may serve has learned from a deleted trace: nothing is to be done"
    route = get_route(c, agent)
    target = route.version
    if route.version in tainted:
        drop_wish(c, agent)
        target = version_before(c, agent, without=tainted)
    if route.canary in tainted:
        end_canary(c, agent)
    for number in tainted:
        take_back(c, get_version(c, agent, number), f"v{number}: learned from traces that were deleted")
    if target == route.version:
        set_head(c, agent, target)
        said = "what serves has not learned from them, and stays"
    else:
        said = put_in_place(c, agent, target)
    names = ", ".join(f"v{number}" for number in tainted)
    return f"{names} learned from deleted traces; training goes on from {_name(target)}; {said}"


def learned_from_left_out(c: sa.Connection, version: AdapterVersion) -> bool:
    """Whether the version itself was trained on a trace that its owner had left out by retraining the agent.

    The trainer may have been in the middle of such a step, and list the version afterwards.
    """
    left_out = sa.select(recalls.c.trace_id).where(recalls.c.agent == version.agent, recalls.c.left_out_at.is_not(None))
    parts = (version.trace_ids[start : start + _MANY] for start in range(0, len(version.trace_ids), _MANY))
    return any(c.execute(left_out.where(recalls.c.trace_id.in_(ids)).limit(1)).first() is not None for ids in parts)


def _leave_out(c: sa.Connection, agent: str) -> None:
    query = recalls.update().where(_by_owner(agent), recalls.c.left_out_at.is_(None))
    c.execute(query.values(left_out_at=time.time()))


def _by_owner(agent: str) -> sa.ColumnElement[bool]:
    return sa.and_(recalls.c.agent == agent, recalls.c.cause == BY_OWNER)


def _learned(records: Sequence[VersionRecord], deleted: Collection[str]) -> list[int]:
    found: set[int] = set()
    for record in records:  # ascending, and a parent's number is lower
        version = record.version
        if version.parent in found or not set(deleted).isdisjoint(version.trace_ids):
            found.add(version.number)
    return sorted(found)


def _name(number: int) -> str:
    return f"v{number}" if number else "the base model"
