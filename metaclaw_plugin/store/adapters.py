"""Adapter versions, the routes that point at them, and what is in flight on each.

Every function takes an open connection and never commits. A version is *held* while its state is candidate or serving:
the trainer is asked to keep it loaded. Of an agent's serving versions one is on the route, and the others drain.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from metaclaw_hooks.names import version_name
from metaclaw_hooks.types import BASE_VERSION, AdapterVersion, VersionState
from metaclaw_hooks.wire import VersionBody

from metaclaw_plugin.errors import UnknownVersionError, VersionStateError
from metaclaw_plugin.store.engine import insert_or_ignore
from metaclaw_plugin.store.schema import adapters, routes

# Every move a version may make. The owner brings back what was retired or rejected, by way of candidate, and takes back
# what was retired, so that it is not gone back to.
LEGAL = {
    VersionState.CANDIDATE: {VersionState.SERVING, VersionState.REJECTED, VersionState.RETIRED},
    VersionState.SERVING: {VersionState.RETIRED, VersionState.REJECTED},
    VersionState.RETIRED: {VersionState.CANDIDATE, VersionState.REJECTED},
    VersionState.REJECTED: {VersionState.CANDIDATE},
}

_NO_CANARY = {"canary": None, "canary_share": None, "canary_since": None}

WISH_SERVE = "serve"
WISH_WITHDRAW = "withdraw"


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """A version and what the worker decided about it."""

    version: AdapterVersion
    decision: Mapping[str, Any] | None  # "sentence" and the gate's figures
    decided_at: float | None
    wish: str | None  # WISH_SERVE, WISH_WITHDRAW or nothing
    wished_from: VersionState | None  # before the wish to serve
    announced_at: float | None
    problem: str | None  # why it could not be loaded
    routed: bool  # answers new exchanges
    canary: bool  # answers those of a share of new sessions

    @property
    def draining(self) -> bool:
        """Serving, but only what began on it."""
        return self.version.state is VersionState.SERVING and not (self.routed or self.canary)

    @property
    def withdrawn(self) -> bool:
        """It never serves again by itself, nor does what is trained from it; it may still be draining."""
        return self.version.state is VersionState.REJECTED or self.wish == WISH_WITHDRAW

    @property
    def shown_state(self) -> str:
        """The state for people: ``draining`` and ``canary`` besides those of ``VersionState``."""
        if self.canary:
            return "canary"
        return "draining" if self.draining else str(self.version.state)

    def summary(self) -> dict[str, Any]:
        """As `metaclaw adapters list --json` and the gateway's route show it."""
        version = self.version
        return {
            "name": version.name,
            "agent": version.agent,
            "number": version.number,
            "state": self.shown_state,
            "parent": version.parent,
            "step": version.step,
            "traces": len(version.trace_ids),
            "created_at": version.created_at,
            "decided_at": self.decided_at,
            "decision": self.decision,
            "problem": self.problem,
        }

    def details(self) -> dict[str, Any]:
        """The summary with the whole manifest."""
        version = self.version
        return self.summary() | {
            "trace_ids": list(version.trace_ids),
            "base_model": version.base_model,
            "metrics": dict(version.metrics),
            "libraries": dict(version.libraries),
            "sha256": version.sha256,
            "path": version.path,
        }


@dataclass(frozen=True, slots=True)
class RouteRow:
    """Where an agent's new exchanges go."""

    agent: str
    version: int  # 0: the base model
    changed_at: float
    head: int | None  # what the trainer has still to be told to train on from
    canary: int | None = None  # the version on trial
    canary_share: float | None = None
    canary_since: float | None = None


def record_candidate(c: sa.Connection, body: VersionBody) -> bool:
    """Enter a version of the trainer's as a candidate; False if it is known already."""
    row = {
        "agent": body.agent,
        "number": body.number,
        "state": VersionState.CANDIDATE.value,
        "manifest": body.model_dump(mode="json"),
        "created_at": body.created_at,
    }
    return insert_or_ignore(c, adapters, [row]) == 1


def get_version(c: sa.Connection, agent: str, number: int) -> VersionRecord:
    """One version.

    Raises:
        UnknownVersionError: if the agent has none of that number.
    """
    found = list_versions(c, agent, number=number)
    if not found:
        raise UnknownVersionError(
            f"agent {agent!r} has no adapter version {number}; `metaclaw adapters list` shows all"
        )
    return found[0]


def list_versions(
    c: sa.Connection,
    agent: str | None = None,
    *,
    states: Sequence[VersionState] | None = None,
    number: int | None = None,
    since: int | None = None,
) -> list[VersionRecord]:
    """Versions by agent and ascending number, of these states if any are given, from number ``since`` on."""
    query = (
        sa.select(adapters, routes.c.version.label("route"), routes.c.canary)
        .select_from(adapters.outerjoin(routes, routes.c.agent == adapters.c.agent))
        .order_by(adapters.c.agent, adapters.c.number)
    )
    if agent is not None:
        query = query.where(adapters.c.agent == agent)
    if number is not None:
        query = query.where(adapters.c.number == number)
    if since is not None:
        query = query.where(adapters.c.number >= since)
    if states is not None:
        query = query.where(adapters.c.state.in_([state.value for state in states]))
    return [_record(row) for row in c.execute(query)]


def newest_number(c: sa.Connection, agent: str) -> int:
    """The number of the agent's newest version, whatever became of it; 0 if it has none."""
    return c.scalar(sa.select(sa.func.max(adapters.c.number)).where(adapters.c.agent == agent)) or 0


def set_state(
    c: sa.Connection, agent: str, number: int, state: VersionState, decision: Mapping[str, Any] | None = None
) -> None:
    """Move a version on; ``decision`` is stored when given.

    Raises:
        UnknownVersionError: if there is no such version.
        VersionStateError: if that move is not in ``LEGAL``.
    """
    row = find_row(c, agent, number, lock=True)
    if row is None:
        raise UnknownVersionError(
            f"agent {agent!r} has no adapter version {number}; `metaclaw adapters list` shows all"
        )
    now = VersionState(row.state)
    if state is not now and state not in LEGAL[now]:
        raise VersionStateError(f"{version_name(agent, number)} is {now}, and cannot become {state} from there")
    values: dict[str, Any] = {"state": state.value}
    if decision is not None:
        values |= {"decision": dict(decision), "decided_at": time.time()}
    update_version(c, agent, number, **values)


def update_version(c: sa.Connection, agent: str, number: int, **values: Any) -> None:
    """Set columns of one version."""
    key = (adapters.c.agent == agent) & (adapters.c.number == number)
    c.execute(adapters.update().where(key).values(**values))


def get_route(c: sa.Connection, agent: str) -> RouteRow:
    """The agent's route; without a row: the base model."""
    row = c.execute(sa.select(routes).where(routes.c.agent == agent)).first()
    return RouteRow(agent, BASE_VERSION, 0.0, None) if row is None else _route_row(row)


def list_routes(c: sa.Connection) -> list[RouteRow]:
    """All routes that were ever set."""
    return [_route_row(row) for row in c.execute(sa.select(routes).order_by(routes.c.agent))]


def set_route(c: sa.Connection, agent: str, version: int, *, head: int | None = None) -> None:
    """Send new exchanges of ``agent`` to ``version`` (0: the base model), and end a trial of a canary if there is one.

    ``head`` is as in ``RouteRow``; None leaves it.

    Raises:
        UnknownVersionError: if there is no such version.
        VersionStateError: if the version is not serving.
    """
    if version != BASE_VERSION:
        row = find_row(c, agent, version, lock=True)
        if row is None:
            raise UnknownVersionError(f"agent {agent!r} has no adapter version {version} to route to")
        if row.state != VersionState.SERVING.value:
            raise VersionStateError(
                f"{version_name(agent, version)} is {row.state}: only a serving version takes requests"
            )
    turn = _next_turn(c, agent)
    values: dict[str, Any] = {"version": version, "changed_at": time.time(), **_NO_CANARY}
    if version == BASE_VERSION:
        values["base_at"] = turn
    else:
        update_version(c, agent, version, served_at=turn)
    _put_route(c, agent, values if head is None else values | {"head": head})


def set_canary(c: sa.Connection, agent: str, version: int, share: float) -> None:
    """Try ``version``, which must be serving, on ``share`` of the sessions that begin from now on."""
    route = get_route(c, agent)
    now = time.time()
    values = {"canary": version, "canary_share": share, "canary_since": now}
    _put_route(c, agent, {"version": route.version, "changed_at": now, **values})


def end_canary(c: sa.Connection, agent: str) -> None:
    """End the trial; the version drains."""
    c.execute(routes.update().where(routes.c.agent == agent).values(**_NO_CANARY))


def set_head(c: sa.Connection, agent: str, head: int | None) -> None:
    """Note what the trainer must be told to train on from; None: it was told."""
    if head is None:
        c.execute(routes.update().where(routes.c.agent == agent).values(head=None))
    elif c.execute(routes.update().where(routes.c.agent == agent).values(head=head)).rowcount == 0:
        _put_route(c, agent, {"version": BASE_VERSION, "changed_at": time.time(), "head": head})


def served_set(c: sa.Connection, judging: Collection[str] = ()) -> list[str]:
    """Names of all versions that vLLM shall hold: the serving ones, and of each agent's candidates those in question.

    A candidate is in question when the owner wished for it, when it is being judged (its name is in ``judging``), or
    when it is its agent's newest; others are passed over.
    """
    newest: dict[str, int] = {}
    held = list_versions(c, states=(VersionState.CANDIDATE, VersionState.SERVING))
    for record in held:
        newest[record.version.agent] = record.version.number
    return [
        record.version.name
        for record in held
        if record.version.state is VersionState.SERVING
        or record.wish == WISH_SERVE
        or record.version.name in judging
        or newest[record.version.agent] == record.version.number
    ]


def find_row(c: sa.Connection, agent: str, number: int, *, lock: bool = False) -> sa.Row[Any] | None:
    """The bare row of a version; ``lock``: no other transaction may move or choose it until ours ends."""
    query = sa.select(adapters).where(adapters.c.agent == agent, adapters.c.number == number)
    return c.execute(query.with_for_update() if lock else query).first()


def _next_turn(c: sa.Connection, agent: str) -> float:
    """Now, but after every earlier turn on the agent's route even if the clock was set back: rollback goes by this."""
    versions = sa.select(sa.func.max(adapters.c.served_at)).where(adapters.c.agent == agent)
    base = sa.select(routes.c.base_at).where(routes.c.agent == agent)
    return max(time.time(), max(c.scalar(versions) or 0.0, c.scalar(base) or 0.0) + 1e-3)


def _put_route(c: sa.Connection, agent: str, values: Mapping[str, Any]) -> None:
    if c.execute(routes.update().where(routes.c.agent == agent).values(**values)).rowcount == 0:
        c.execute(routes.insert().values(agent=agent, **values))


def _route_row(row: sa.Row[Any]) -> RouteRow:
    return RouteRow(row.agent, row.version, row.changed_at, row.head, row.canary, row.canary_share, row.canary_since)


def _record(row: sa.Row[Any]) -> VersionRecord:
    return VersionRecord(
        version=VersionBody.model_validate(row.manifest).version(VersionState(row.state)),
        decision=row.decision,
        decided_at=row.decided_at,
        wish=row.wish,
        wished_from=None if row.wished_from is None else VersionState(row.wished_from),
        announced_at=row.announced_at,
        problem=row.problem,
        routed=row.route == row.number,
        canary=row.canary == row.number,
    )
