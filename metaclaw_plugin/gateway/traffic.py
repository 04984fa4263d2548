"""When requests came last, for windows that open when nobody asks for anything: of each agent and of anyone.

Every request counts from its start to its end, whether or not anything of it is kept; but not those of our own judge,
evolver and replays, which nobody waits for. A heartbeat writes what is new, never a request.
"""

from __future__ import annotations

import threading
import time

from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.store.last_requests import ANYONE, note_requests


class Traffic:
    """What this gateway process sees of requests. One per process; safe from any thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._open: dict[str, int] = {}  # agent, or ANYONE -> requests on their way
        self._unwritten: dict[str, float] = {}  # agent, or ANYONE -> when one was last seen
        self._lock = threading.Lock()

    def began(self, agent: str | None) -> str:
        """A request of ``agent``, or of nobody's; returns the name under which it has to end."""
        name = ANYONE if agent is None else agent
        with self._lock:
            self._open[name] = self._open.get(name, 0) + 1
            self._unwritten[name] = time.time()
        return name

    def ended(self, name: str) -> None:
        """A request that began under ``name`` has ended."""
        with self._lock:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]
            self._unwritten[name] = time.time()

    def flush(self) -> None:
        """Write what was seen since the last flush, if anything was.

        Raises:
            SQLAlchemyError: if the store does not answer; nothing is lost, the next flush writes it all.
        """
        with self._lock:
            seen = self._unwritten | dict.fromkeys(self._open, time.time())
            self._unwritten = {}
        if not seen:
            return
        seen[ANYONE] = max(seen.values())
        try:
            with self._engine.begin() as c:
                note_requests(c, seen)
        except SQLAlchemyError:
            with self._lock:
                self._unwritten = seen | self._unwritten
            raise
