"""Who works on what. A lease runs out, so that a killed worker's work is taken up again; nothing is done twice, since
whoever writes a result must still hold the lease.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Collection

import psutil
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.engine import dialect_insert
from metaclaw_plugin.store.schema import leases, rewards, sessions, traces


def this_worker() -> str:
    """An owner's name that tells this process from all others: host, pid, and when it started."""
    started = int(psutil.Process().create_time() * 100)
    return f"{socket.gethostname()[:24]}:{os.getpid()}:{started}"


def is_dead(owner: str) -> bool:
    """Whether ``owner`` was a worker of this machine that has ended; false for other machines', and for the console."""
    host, *process = owner.rsplit(":", 2)
    if len(process) != 2 or host != socket.gethostname()[:24]:
        return False
    pid, started = map(int, process)
    try:
        return int(psutil.Process(pid).create_time() * 100) != started
    except psutil.NoSuchProcess:
        return True


def acquire(c: Connection, name: str, owner: str, now: float, seconds: float) -> bool:
    """Take, or prolong, the lease ``name`` until ``now + seconds``; false while another owner holds it."""
    values = {"owner": owner, "until": now + seconds}
    free = sa.or_(leases.c.owner == owner, leases.c.until < now)
    statement = dialect_insert(c, leases).values(name=name, **values)
    taking = statement.on_conflict_do_update(index_elements=[leases.c.name], set_=values, where=free)
    return c.execute(taking.returning(leases.c.owner)).scalar_one_or_none() is not None


def release(c: Connection, name: str, owner: str) -> None:
    """Give the lease ``name`` back, if ``owner`` holds it."""
    c.execute(sa.delete(leases).where(leases.c.name == name, leases.c.owner == owner))


def release_all(c: Connection, owner: str) -> None:
    """Give back everything that ``owner`` holds."""
    c.execute(sa.delete(leases).where(leases.c.owner == owner))
    held = sa.update(traces).where(traces.c.lease_owner == owner)
    c.execute(held.values(lease_owner=None, lease_until=None))


def holders(c: Connection) -> set[str]:
    """Everyone who holds a lease of any kind."""
    of_traces = sa.select(traces.c.lease_owner).where(traces.c.lease_owner.is_not(None))
    found = c.execute(sa.select(leases.c.owner).union(of_traces)).scalars()
    return {owner for owner in found if owner is not None}


def ready_to_score(
    now: float, evidence_timeout: float, immediate: Collection[str], whole_session: Collection[str] = ()
) -> sa.ColumnElement[bool]:
    """The traces that may be scored: free, and the evidence is in.

    It is in once the next turn has come, the session is closed, someone has given feedback, or ``evidence_timeout``
    seconds have passed since the reply; at once for the agents in ``immediate``, whose rewards need no evidence; and
    not before the session is closed for those in ``whole_session``.
    """
    t, later = traces.c, traces.alias("later").c
    followed = sa.exists().where(later.session == t.session, later.turn > t.turn, later.kind == "main")
    closed = sa.exists().where(sessions.c.id == t.session, sessions.c.closed_at.is_not(None))
    told = sa.exists().where(rewards.c.trace_id == t.id)
    session_goes_on = sa.exists().where(sessions.c.id == t.session, sessions.c.closed_at.is_(None))
    evidence = sa.or_(
        t.finished_at < now - evidence_timeout,
        t.finished_at > now + evidence_timeout,  # a clock was set back since: nobody knows how long that has been
        t.agent.in_(list(immediate)),
        followed.correlate(traces),
        closed.correlate(traces),
        told.correlate(traces),
    )
    if whole_session:
        patient = sa.and_(t.agent.in_(list(whole_session)), session_goes_on.correlate(traces))
        evidence = sa.and_(evidence, ~patient)
    free = sa.or_(t.lease_until.is_(None), t.lease_until < now)
    return sa.and_(t.score == "waiting", t.kind == "main", free, evidence)


def claim_traces(c: Connection, ready: sa.ColumnElement[bool], owner: str, until: float, limit: int) -> list[int]:
    """Lease at most ``limit`` of the ``ready`` traces, the oldest first; their ``seq``, ascending."""
    oldest = sa.select(traces.c.seq).where(ready).order_by(traces.c.seq).limit(limit)
    claim = sa.update(traces).where(traces.c.seq.in_(oldest.with_for_update(skip_locked=True)))
    claimed = c.execute(claim.values(lease_owner=owner, lease_until=until).returning(traces.c.seq))
    return sorted(claimed.scalars())
