"""What is decided about candidates and canaries, written down in one transaction each.

A decision takes a while to reach, and what it rests on may change meanwhile: the owner rolls back, or another publisher
was first. So each function locks the agent, looks again, and does nothing, or rejects, when the decision holds no more.
The connection must be of ``engine.begin()``.
"""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa
from metaclaw_hooks.types import BASE_VERSION, VersionState

from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.adapters import RouteRow, VersionRecord
from metaclaw_plugin.store.deciding import lock_agent
from metaclaw_plugin.store.lineage import learned_from_left_out
from metaclaw_plugin.store.withdrawal import withdraw
from metaclaw_plugin.worker.verdicts import Decision


def settle(
    c: sa.Connection, record: VersionRecord, decision: Decision, against: int, canary_share: float
) -> Decision | None:
    """Flip the route to an accepted candidate, or send the trainer back to what serves; the decision that was taken.

    None: nothing was done, since the version, the owner's word, or the route is not what it was when ``record`` and
    ``against`` (the version on the route) were read.
    """
    agent, number, wished = record.version.agent, record.version.number, record.wish == store.WISH_SERVE
    lock_agent(c, agent)
    now, route = store.get_version(c, agent, number), store.get_route(c, agent)
    if now.version.state is not VersionState.CANDIDATE or now.wish != record.wish:
        return None  # another publisher, or the owner, was first
    if not wished:
        judged_against = decision.figures.get("against", against)
        if route.canary is not None or not route.version == against == judged_against:
            return None  # judged against a version that no longer serves: judged again
        decision = _unfit(c, now) or decision
    if not decision.accepted:
        store.set_state(c, agent, number, VersionState.REJECTED, decision.stored())
        store.set_head(c, agent, route.version)
        return decision
    store.set_state(c, agent, number, VersionState.SERVING, decision.stored())
    store.update_version(c, agent, number, wish=None, wished_from=None, problem=None, announced_at=None)
    if canary_share and not wished and route.version != BASE_VERSION:
        store.set_canary(c, agent, number, canary_share)
    else:
        store.set_route(c, agent, number, head=number if wished else None)
    return decision


def end_trial(c: sa.Connection, route: RouteRow, decision: Decision) -> bool:
    """Promote or take back the canary of ``route``; False: that trial is over already."""
    lock_agent(c, route.agent)
    now = store.get_route(c, route.agent)
    if route.canary is None or (now.version, now.canary, now.canary_since) != (
        route.version,
        route.canary,
        route.canary_since,
    ):
        return False
    store.set_state(c, route.agent, route.canary, VersionState.SERVING, decision.stored())
    if decision.accepted:
        store.set_route(c, route.agent, route.canary)
        return True
    store.end_canary(c, route.agent)
    store.set_head(c, route.agent, route.version)
    withdraw(c, route.agent, route.canary, decision.sentence)
    return True


def pass_over(c: sa.Connection, agent: str, judging: Collection[str]) -> None:
    """Settle the candidates that need no judging: older than the newest, or unfit whatever they are worth.

    One that is being judged (its name is in ``judging``) is judged to the end, however many newer ones there are.
    """
    lock_agent(c, agent)
    newest = store.newest_number(c, agent)
    for record in store.list_versions(c, agent, states=(VersionState.CANDIDATE,)):
        number = record.version.number
        if record.wish is not None:
            continue
        unfit = _unfit(c, record)
        if unfit is not None:
            store.set_state(c, agent, number, VersionState.REJECTED, unfit.stored())
        elif number != newest and record.version.name not in judging:
            decision = Decision(False, f"v{number}: passed over for the newer v{newest}", {})
            store.set_state(c, agent, number, VersionState.RETIRED, decision.stored())


def _unfit(c: sa.Connection, record: VersionRecord) -> Decision | None:
    """Why a candidate may not serve whatever it is worth; the trainer is sent back where it has not been yet."""
    version = record.version
    fallen = _rejected_ancestor(c, record)
    if fallen is not None:
        return Decision(False, f"v{version.number}: trained from v{fallen}, which was rejected", {})
    if not learned_from_left_out(c, version):
        return None
    store.set_head(c, version.agent, store.get_route(c, version.agent).version)
    return Decision(False, f"v{version.number}: learned from traces that were deleted, and was to be retrained", {})


def _rejected_ancestor(c: sa.Connection, record: VersionRecord) -> int | None:
    """The nearest version that this one was trained from and that was rejected or taken back; None if there is none.

    The search ends at one that was accepted: with whatever is taken back goes all that was trained from it
    (``store/withdrawal.py``), so what is still accepted has no such ancestor, or was put in place all the same.
    """
    version = record.version
    while found := store.list_versions(c, version.agent, number=version.parent):
        parent = found[0]
        if parent.version.number >= version.number:
            return None
        if parent.withdrawn:
            return parent.version.number
        if (parent.decision or {}).get("accepted"):
            return None
        version = parent.version
    return None
