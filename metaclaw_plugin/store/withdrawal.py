"""Versions that are taken back: neither they nor what was trained from them serve by themselves again.

That is kept true by writing it down for all of them at once; what the trainer lists later finds its parent taken back.
"""

from __future__ import annotations

import sqlalchemy as sa
from metaclaw_hooks.types import BASE_VERSION, VersionState

from metaclaw_plugin.store.adapters import (
    WISH_WITHDRAW,
    VersionRecord,
    get_version,
    list_versions,
    set_state,
    update_version,
)


def withdraw(c: sa.Connection, agent: str, number: int, sentence: str, *, spare: int = BASE_VERSION) -> None:
    """Take back version ``number`` and all that was trained from it, but for ``spare`` and what was trained from that.

    Raises:
        UnknownVersionError: if there is no such version.
    """
    take_back(c, get_version(c, agent, number), sentence)
    taken = {number}
    for record in list_versions(c, agent, since=number + 1):  # ascending, and a parent's number is lower
        version = record.version
        if version.parent not in taken or version.number == spare:
            continue
        taken.add(version.number)
        if not record.withdrawn:
            take_back(c, record, f"v{version.number}: trained from v{number}, which was taken back")


def take_back(c: sa.Connection, record: VersionRecord, sentence: str) -> None:
    """Reject a version; one that answers still goes on until it is off the route and drained."""
    version = record.version
    decision = dict(record.decision or {}) | {"accepted": False, "sentence": sentence}
    if version.state is VersionState.SERVING:
        update_version(c, version.agent, version.number, wish=WISH_WITHDRAW, decision=decision)
        return
    set_state(c, version.agent, version.number, VersionState.REJECTED, decision)
    update_version(c, version.agent, version.number, wish=None, wished_from=None)
