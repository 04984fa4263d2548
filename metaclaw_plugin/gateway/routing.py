"""Which version answers a request, and what is in flight on each version.

How a version is unloaded without a request ever meeting its absence:

    1. the worker flips the route: new exchanges begin on the new version
    2. exchanges in progress stay on the old one (law 6); ``pick_route`` takes it only while its row says serving
    3. in the transaction in which ``pick_route`` chose, ``InFlight.begin`` makes sure that this process has a row
    4. the worker retires the old version in a transaction that locks it and finds no such row and no open exchange

So a request begins either before 4, which then sees it, or after 4, and then on another version. The rows are kept by
counts in memory that the heartbeat writes out: a busy gateway writes once per version and beat, not once per request.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
import zlib
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from metaclaw_hooks.names import version_name
from metaclaw_hooks.types import BASE_VERSION, Kind, VersionState
from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.store.engine import dialect_insert
from metaclaw_plugin.store.schema import adapters, in_flight, routes, sessions

UPSTREAM = "metaclaw"  # the wildcard deployment of the LiteLLM config: metaclaw/*
BASE_MODEL_NAME = "metaclaw-base"  # the name under which vLLM serves the base model

# Built once: to build a statement costs more than to run it, and these are run for every request.
_SERVING = (
    sa.select(adapters.c.number, routes)
    .select_from(adapters.outerjoin(routes, routes.c.agent == adapters.c.agent))
    .where(adapters.c.agent == sa.bindparam("of"), adapters.c.state == VersionState.SERVING.value)
    .order_by(adapters.c.number)  # the order in which all lock them, so that no two wait for each other
    .with_for_update(read=True, of=adapters)
)


class RoutedTurn(Protocol):
    """What routing needs to know of a turn."""

    @property
    def session(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def new_exchange(self) -> bool: ...
    @property
    def adapter_version(self) -> int | None: ...  # what the exchange is pinned to


@dataclass(frozen=True, slots=True)
class Route:
    """Where one request goes."""

    model: str  # for LiteLLM: metaclaw/agent@vN or metaclaw/metaclaw-base
    adapter_version: int  # 0: the base model
    left: int | None = None  # the version it should have had, if that one is no longer held: to be counted and shown


def upstream_model(agent: str, version: int) -> str:
    """The model name that LiteLLM's wildcard deployment passes to vLLM."""
    return f"{UPSTREAM}/{BASE_MODEL_NAME if version == BASE_VERSION else version_name(agent, version)}"


def pick_route(c: sa.Connection, agent: str, turn: RoutedTurn) -> Route:
    """Choose the version that answers this request.

    A tool loop stays on the version that it is pinned to, the one that asked for the tool, while that one is held;
    everything else takes the agent's route, or its canary; when the version on the route is gone, the newest that
    serves, else the base model.
    Call ``InFlight.begin`` in the same transaction, one of ``engine.begin()``.
    """
    rows = c.execute(_SERVING, {"of": agent}).all()
    held = {row.number for row in rows} | {BASE_VERSION}
    routed = rows[0].version if rows and rows[0].version is not None else BASE_VERSION
    main = turn.kind is Kind.MAIN
    pinned = turn.adapter_version if main and not turn.new_exchange else None
    if pinned is None and rows and rows[0].canary is not None and main and _is_tried(c, turn.session, rows[0]):
        pinned = rows[0].canary
    wanted = routed if pinned is None else pinned
    version = wanted
    if version not in held:
        version = routed if routed in held else max(held)
    return Route(upstream_model(agent, version), version, left=None if version == wanted else wanted)


def _is_tried(c: sa.Connection, session: str, route: sa.Row[Any]) -> bool:
    """Whether the canary answers this session: one that began after the trial did, and drew its lot by its id."""
    if zlib.crc32(session.encode()) / 2**32 >= route.canary_share:
        return False
    started = c.scalar(sa.select(sessions.c.started_at).where(sessions.c.id == session))
    return started is not None and bool(started >= route.canary_since)


@dataclass(slots=True)
class Ticket:
    """One request in flight; give it back to ``InFlight.end`` exactly once, whatever became of the request."""

    agent: str
    version: int
    ended: bool = False


class InFlight:
    """What this gateway process has in flight, by agent and version. One per process; safe from any thread."""

    def __init__(self, engine: Engine, process: str | None = None) -> None:
        self._engine = engine
        self.process = process or f"{socket.gethostname()[:24]}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._counts: dict[tuple[str, int], int] = {}
        self._announced: set[tuple[str, int]] = set()  # keys whose row is known to be committed
        self._lock = threading.Lock()
        self._stamp = 0.0

    def begin(self, c: sa.Connection, agent: str, version: int) -> Ticket:
        """Count a request that is about to be sent, in the transaction that chose its version."""
        key = (agent, version)
        with self._lock:
            self._counts[key] = count = self._counts.get(key, 0) + 1
            announced = key in self._announced
            stamp = self._next_stamp()
        if not announced and version != BASE_VERSION:
            self._write(c, key, count, stamp)
        return Ticket(agent, version)

    def end(self, ticket: Ticket) -> None:
        """The request has ended, one way or another. A second call changes nothing."""
        with self._lock:
            if ticket.ended:
                return
            ticket.ended = True
            self._counts[ticket.agent, ticket.version] -= 1

    def flush(self) -> None:
        """Write this process's counts and heartbeat.

        Raises:
            SQLAlchemyError: if the store does not answer; nothing is lost, the next flush writes it all.
        """
        with self._lock:
            counts = {key: count for key, count in self._counts.items() if key[1] != BASE_VERSION}
            idle = [key for key, count in self._counts.items() if count == 0]
            for key in idle:  # from here on a new request writes its own row, with a later stamp than ours
                del self._counts[key]
                self._announced.discard(key)
            stamp = self._next_stamp()
        busy = [key for key, count in counts.items() if count > 0]
        gone = [key for key, count in counts.items() if count == 0]
        if not busy and not gone:
            return
        try:
            with self._engine.begin() as c:
                for key in gone:
                    c.execute(in_flight.delete().where(self._key(key), in_flight.c.at < stamp))
                for key in busy:
                    self._write(c, key, counts[key], stamp)
        except SQLAlchemyError:
            with self._lock:
                for key in gone:
                    self._counts.setdefault(key, 0)
            raise
        with self._lock:
            self._announced.update(key for key in busy if key in self._counts)

    def _next_stamp(self) -> float:
        # Rises even if the clock is set back: a delete must never catch a row that was written after it was decided.
        self._stamp = max(time.time(), self._stamp + 1e-6)
        return self._stamp

    def _key(self, key: tuple[str, int]) -> sa.ColumnElement[bool]:
        return sa.and_(in_flight.c.process == self.process, in_flight.c.agent == key[0], in_flight.c.version == key[1])

    def _write(self, c: sa.Connection, key: tuple[str, int], count: int, stamp: float) -> None:
        statement = dialect_insert(c, in_flight).values(
            process=self.process, agent=key[0], version=key[1], requests=count, at=stamp
        )
        c.execute(
            statement.on_conflict_do_update(
                index_elements=["process", "agent", "version"],
                set_={"requests": statement.excluded.requests, "at": statement.excluded.at},
                where=in_flight.c.at < statement.excluded.at,
            )
        )
