"""Sessions and the states at which they can go on. Every gateway process works on these rows and keeps none of them."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Row

from metaclaw_plugin.errors import StoreError, UnknownSessionError
from metaclaw_plugin.store import schema
from metaclaw_plugin.store.engine import insert_or_ignore, put

_S = schema.sessions.c
_K = schema.chain.c
_OPEN = _S.closed_at.is_(None)
_COUNTED = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}):([0-9]{1,9})")

# What every request executes is built once: building a statement costs several times its execution.
_NAMED = sa.select(_S.id, _S.epoch).where(
    _S.agent == sa.bindparam("agent"), _S.evidence_key == sa.bindparam("key"), _OPEN
)
_PAUSED = (
    sa.select(_K.hash, _K.session, _K.tip, _K.at)
    .join(schema.sessions, _S.id == _K.session)
    .where(_K.agent == sa.bindparam("agent"), _K.hash.in_(sa.bindparam("hashes", expanding=True)), _OPEN)
)
_PASS_TIP = sa.update(schema.chain).where(_K.session == sa.bindparam("of"), _K.tip.is_(True)).values(tip=False)
_TAKE = sa.select(schema.sessions).where(_S.id == sa.bindparam("session")).with_for_update()
_TAKEN = (
    sa.update(schema.sessions)
    .where(_S.id == sa.bindparam("session"))
    .values(
        {name: sa.bindparam(f"new_{name}") for name in ("turns", "last_at", "exchanges", "anchor", "adapter_version")}
    )
)
_SETTLE = (
    sa.update(schema.sessions)
    .where(_S.id == sa.bindparam("session"), _OPEN)
    .values(
        last_at=sa.case((_S.last_at < sa.bindparam("now"), sa.bindparam("now")), else_=_S.last_at),
        adapter_version=sa.bindparam("pin"),
    )
)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What told a session apart."""

    name: str  # "x-session-id", "runtime", "chain" ...
    value: str
    epoch: int = 0  # the client's own count; a raised one ends the session

    @property
    def key(self) -> str:
        """sha256 of name and value, hex."""
        return hashlib.sha256(f"{self.name}\0{self.value}".encode("utf-8", "surrogatepass")).hexdigest()


class Placed(Protocol):
    """What tells a request of a session."""

    @property
    def session(self) -> str: ...
    @property
    def turn(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Place:
    """Where in its session a request stands."""

    session: str
    held_out: bool
    turn: int
    exchange: int
    new_exchange: bool
    adapter_version: int | None  # that the exchange in progress is pinned to


def find_named(c: Connection, agent: str, evidence: Evidence, now: float) -> str | None:
    """Id of the open session that ``evidence`` names; those of a lower epoch are closed, since the client raised it."""
    rows = c.execute(_NAMED, {"agent": agent, "key": evidence.key}).all()
    for row in rows:
        if row.epoch < evidence.epoch:
            close_session(c, row.id, "epoch", now)
    return next((str(row.id) for row in rows if row.epoch == evidence.epoch), None)


def open_session(
    c: Connection, agent: str, evidence: Evidence, now: float, one_in: int, anchor: str | None = None
) -> Place | None:
    """Open a session with its first request; ``None`` if another process opened one on the same evidence.

    ``anchor`` is that of ``take_turn``. One session in ``one_in`` is held out.
    """
    return _insert(c, secrets.token_hex(12), agent, evidence, now, one_in, anchor)


def open_unnamed(c: Connection, agent: str, now: float, one_in: int, anchor: str | None) -> Place:
    """Open a session that nothing but its conversation tells apart. A side call's, without an anchor, is closed."""
    session = secrets.token_hex(12)
    evidence = Evidence("side" if anchor is None else "chain", session)
    place = _insert(c, session, agent, evidence, now, one_in, anchor)
    if place is None:
        raise StoreError(f"session id {session} was drawn twice; try again")
    if anchor is None:
        close_session(c, session, "side", now)
    return place


def _insert(
    c: Connection, session: str, agent: str, evidence: Evidence, now: float, one_in: int, anchor: str | None
) -> Place | None:
    main, held_out = anchor is not None, is_held_out(session, one_in)
    row = {
        "id": session,
        "agent": agent,
        "evidence": evidence.name,
        "evidence_key": evidence.key,
        "epoch": evidence.epoch,
        "started_at": now,
        "last_at": now,
        "held_out": held_out,
        "turns": 1,
        "exchanges": int(main),
        "anchor": anchor,
        "without_skills": [],
    }
    if not insert_or_ignore(c, schema.sessions, [row]):
        return None
    return Place(session, held_out, 0, 0, new_exchange=main, adapter_version=None)


def is_held_out(session: str, one_in: int) -> bool:
    """One session in ``one_in``, by the hash of its id; none if that is 0."""
    return one_in > 0 and int.from_bytes(hashlib.sha256(session.encode()).digest()[:8], "big") % one_in == 0


def find_by_chain(c: Connection, agent: str, hashes: Sequence[str]) -> str | None:
    """The open session of ``agent`` that paused at one of ``hashes``, given longest first, and goes on from there now.

    Of several, the one whose newest answer ended there, and of these the one that has waited longest: conversations
    that began with the same words then each go on in a session of their own.
    """
    if not hashes:
        return None
    order = {digest: place for place, digest in enumerate(hashes)}
    found = c.execute(_PAUSED, {"agent": agent, "hashes": list(hashes)})
    rows = sorted(found, key=lambda row: (order[row.hash], not row.tip, row.at))
    if not rows:
        return None
    c.execute(_TAKE, {"session": rows[0].session})  # every writer locks the session first, and its chain after that
    c.execute(_PASS_TIP, {"of": rows[0].session})
    return str(rows[0].session)


def find_by_response(c: Connection, agent: str, response_id: str) -> str | None:
    """The open session in which the agent gave the response ``response_id``."""
    t = schema.traces.c
    query = (
        sa.select(t.session)
        .join(schema.sessions, _S.id == t.session)
        .where(t.response_id == response_id, t.agent == agent, _OPEN)
        .limit(1)
    )
    found = c.execute(query).scalar_one_or_none()
    return None if found is None else str(found)


def take_turn(c: Connection, session: str, now: float, anchor: str | None, in_tool_loop: bool) -> Place:
    """Count one more request of the session.

    ``anchor`` is the hash up to the human message that is being answered (``None``: a side call, which answers none). A
    new one starts an exchange, except inside a tool loop; a human message that is sent again stays in its exchange, but
    no longer on the version that this was pinned to.
    """
    row: Row[Any] = c.execute(_TAKE, {"session": session}).one()
    main = anchor is not None
    goes_on = in_tool_loop and row.exchanges > 0
    new = main and not goes_on and anchor != row.anchor
    c.execute(
        _TAKEN,
        {
            "session": session,
            "new_turns": row.turns + 1,
            "new_last_at": max(now, row.last_at),
            "new_exchanges": row.exchanges + new,
            "new_anchor": anchor if new else row.anchor,
            "new_adapter_version": None if main and not goes_on else row.adapter_version,
        },
    )
    return Place(
        session=session,
        held_out=row.held_out,
        turn=row.turns,
        exchange=max(row.exchanges + new - 1, 0),
        new_exchange=new,
        adapter_version=row.adapter_version if main and goes_on else None,
    )


def settle_turn(c: Connection, agent: str, place: Placed, hashes: Sequence[str], now: float, pin: int | None) -> None:
    """A request was answered: the session paused at ``hashes``, one for each choice that was given.

    ``pin``: the adapter version on which the tool loop goes on that the answer left open; ``None``: it left none. A
    session that is closed goes on nowhere.
    """
    session = place.session
    if not c.execute(_SETTLE, {"session": session, "now": now, "pin": pin}).rowcount or not hashes:
        return
    if place.turn > 0:
        c.execute(_PASS_TIP, {"of": session})
    for digest in dict.fromkeys(hashes):
        row = {"agent": agent, "hash": digest, "session": session, "tip": True, "at": now}
        put(c, schema.chain, row, ("tip", "at"))


def close_session(c: Connection, session: str, reason: str, now: float) -> bool:
    """Close the session; False if it was closed already. Its chain is forgotten: what follows is another session.

    Raises:
        UnknownSessionError: if there is none.
    """
    closing = sa.update(schema.sessions).where(_S.id == session, _OPEN)
    closed = c.execute(closing.values(closed_at=now, close_reason=reason[:32])).rowcount == 1
    if not closed and c.execute(sa.select(_S.id).where(_S.id == session)).one_or_none() is None:
        raise UnknownSessionError(f"no session {session[:80]!r}")
    c.execute(sa.delete(schema.chain).where(schema.chain.c.session == session))
    return closed


def close_idle(c: Connection, now: float, idle_timeout: float, limit: int = 200) -> list[str]:
    """Close up to ``limit`` sessions without a request for ``idle_timeout`` seconds; returns their ids."""
    idle = sa.select(_S.id).where(_OPEN, _S.last_at < now - idle_timeout).order_by(_S.last_at).limit(limit)
    found = [str(session) for session in c.execute(idle).scalars()]
    return [session for session in found if close_session(c, session, "idle", now)]


def find_session(c: Connection, agents: Sequence[str], name: str) -> str:
    """Id of the session of one of ``agents`` that ``name`` means: our id, or what the client calls it.

    Raises:
        UnknownSessionError: if there is none, or it is another agent's.
    """
    sources = ("x-session-id", "x-litellm-session-id", "affinity", "prompt_cache_key", "metadata", "runtime")
    value, epoch = split_epoch(name)
    keys = {Evidence(source, name).key for source in sources} | {Evidence("affinity", value).key}
    query = (
        sa.select(_S.id)
        .where(_S.agent.in_(agents), sa.or_(_S.id == name, sa.and_(_S.evidence_key.in_(keys), _OPEN)))
        .order_by(_S.id != name, sa.func.abs(_S.epoch - epoch), _S.last_at.desc())
        .limit(1)
    )
    found = c.execute(query).scalar_one_or_none()
    if found is None:
        raise UnknownSessionError(f"no open session {name[:80]!r} of yours")
    return str(found)


def split_epoch(value: str) -> tuple[str, int]:
    """``"<uuid>:3"`` -> ``("<uuid>", 3)``: OpenClaw counts resets and compactions so; anything else is epoch 0.

    Other clients end their ids in numbers that count nothing, as in ``telegram:12345``.
    """
    if (found := _COUNTED.fullmatch(value)) is None:
        return value, 0
    return found[1], int(found[2])
