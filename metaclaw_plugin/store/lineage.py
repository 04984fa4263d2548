"""What a version has learned from, and what is to be done when its owner deletes some of that.

A version has learned from a trace if it, or a version that it was trained from, was trained on it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set

import sqlalchemy as sa
from metaclaw_hooks.types import BASE_VERSION, VersionState

from metaclaw_plugin.store.adapters import VersionRecord, get_route, list_versions, set_head, set_state, update_version
from metaclaw_plugin.store.schema import recalls
from metaclaw_plugin.store.wishes import rollback


def learned_from_deleted(c: sa.Connection, agent: str) -> list[int]:
    """Numbers, ascending, of the agent's versions that have learned from a trace which was deleted since."""
    deleted = set(c.scalars(sa.select(recalls.c.trace_id).where(recalls.c.agent == agent)))
    return _learned(list_versions(c, agent), deleted) if deleted else []


def retrain_without_deleted(c: sa.Connection, agent: str) -> str:
    """Go back to the newest accepted version that learned from no deleted trace, and train on from there.

    ``c`` must be of ``engine.begin()``. Returns one line that says what will happen. No version that has learned from a
    deleted trace is chosen by itself again; its weights stay until the trainer's disk budget removes them.
    """
    tainted = learned_from_deleted(c, agent)
    if not tainted:
        return f"no version of {agent} has learned from a deleted trace: nothing is to be done"
    records = {record.version.number: record for record in list_versions(c, agent)}
    route = get_route(c, agent).version
    target = route if route not in tainted else _newest_clean(records, tainted)
    if route in tainted:
        said = rollback(c, agent, target)
    else:
        set_head(c, agent, target)
        said = "what serves has not learned from them, and stays"
    for number in tainted:
        _set_aside(c, records[number])
    names = ", ".join(f"v{number}" for number in tainted)
    return f"{names} learned from deleted traces; training goes on from {_name(target)}; {said}"


def _newest_clean(records: Mapping[int, VersionRecord], tainted: Collection[int]) -> int:
    clean = [
        number
        for number, record in records.items()
        if number not in tainted
        and (record.decision or {}).get("accepted")
        and record.version.state in (VersionState.SERVING, VersionState.RETIRED)
    ]
    return max(clean, default=BASE_VERSION)


def _set_aside(c: sa.Connection, record: VersionRecord) -> None:
    version = record.version
    sentence = f"v{version.number}: learned from traces that were deleted"
    decision = dict(record.decision or {}) | {"accepted": False, "sentence": sentence}
    update_version(c, version.agent, version.number, decision=decision)
    if version.state is VersionState.CANDIDATE:
        set_state(c, version.agent, version.number, VersionState.REJECTED)


def _learned(records: Sequence[VersionRecord], deleted: Set[str]) -> list[int]:
    found: set[int] = set()
    for record in records:  # ascending, and a parent's number is lower
        version = record.version
        if version.parent in found or not deleted.isdisjoint(version.trace_ids):
            found.add(version.number)
    return sorted(found)


def _name(number: int) -> str:
    return f"v{number}" if number else "the base model"
