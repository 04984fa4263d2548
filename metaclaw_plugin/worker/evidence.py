"""What is known about a reply besides itself: what followed, and the conversation that it belongs to."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from metaclaw_hooks.types import Kind, Session, Trace
from sqlalchemy.engine import Connection, RowMapping

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.store.codec import decode_trace
from metaclaw_plugin.store.schema import sessions, traces

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Of a group of traces; read at once, since a conversation's traces tend to come together."""

    sessions: Mapping[str, Session]
    next_traces: Mapping[str, Trace]  # by the id of the trace before

    def session(self, trace: Trace) -> Session:
        """The trace's session; of one that the store no longer knows, what the trace itself tells."""
        known = self.sessions.get(trace.session)
        if known is not None:
            return known
        return Session(trace.session, trace.agent, trace.started_at, trace.finished_at, None, False, (trace,))

    def following(self, trace: Trace) -> Trace | None:
        """The first request of the conversation after this one."""
        return self.next_traces.get(trace.id)


def load_evidence(c: Connection, of: Sequence[Trace], *, next_traces: bool, whole_sessions: bool) -> Evidence:
    """Read the evidence about the traces ``of``; what no reward looks at (the two flags) is not read.

    Without ``whole_sessions`` a session holds none of its traces.
    """
    ids = {trace.session for trace in of}
    known = {trace.id: trace for trace in of}
    members: dict[str, list[Trace]] = defaultdict(list)
    if whole_sessions:
        query = sa.select(traces).where(traces.c.session.in_(ids)).order_by(traces.c.turn, traces.c.seq)
        for row in c.execute(query).mappings():
            if (member := known.get(row["id"]) or _decode(row)) is not None:
                members[row["session"]].append(member)
    found = {
        row.id: Session(
            row.id, row.agent, row.started_at, row.last_at, row.closed_at, row.held_out, tuple(members[row.id])
        )
        for row in c.execute(sa.select(sessions).where(sessions.c.id.in_(ids)))
    }
    if not next_traces:
        return Evidence(found, {})
    if whole_sessions:
        following = {trace.id: _after(trace, members[trace.session]) for trace in of}
    else:
        following = _read_following(c, of)
    return Evidence(found, {name: trace for name, trace in following.items() if trace is not None})


def _after(trace: Trace, members: Sequence[Trace]) -> Trace | None:
    return next((other for other in members if other.turn > trace.turn and other.kind == trace.kind), None)


def _read_following(c: Connection, of: Sequence[Trace]) -> dict[str, Trace | None]:
    """The first main trace after each; where to look is asked at once, and what is in the group is not read again."""
    t = traces.c
    places = sa.select(t.id, t.session, t.turn, t.seq).where(t.session.in_({trace.session for trace in of}))
    later: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for place in c.execute(places.where(t.kind == Kind.MAIN.value)):
        later[place.session].append((place.turn, place.seq, place.id))
    next_id: dict[str, str] = {}
    for trace in of:
        if after := [found for found in later[trace.session] if found[0] > trace.turn]:
            next_id[trace.id] = min(after)[2]
    known: dict[str, Trace | None] = {trace.id: trace for trace in of}
    if unread := set(next_id.values()) - set(known):
        for row in c.execute(sa.select(traces).where(t.id.in_(unread))).mappings():
            known[row["id"]] = _decode(row)
    return {name: known.get(following) for name, following in next_id.items()}


def _decode(row: RowMapping) -> Trace | None:
    """A damaged trace is no evidence; that it is damaged is told when it is scored itself."""
    try:
        return decode_trace(row)
    except StoreError:
        logger.warning("trace %s is damaged, so its neighbours are scored without it", row["id"])
        return None
