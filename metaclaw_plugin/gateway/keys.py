"""Whom keys act for, remembered for a few seconds.

Keys are compared by their sha256. What was found is kept briefly, so that a revoked key is soon refused, and for longer
only while the store does not answer.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.store.agents import KeyIdentity, agents_of_key, hash_key

logger = logging.getLogger(__name__)

FRESH = 3.0  # seconds for which an answer of the store is believed
STALE = 600.0  # seconds for which it is believed while the store does not answer
_CACHED = 4096  # keys


class KeyCache:
    """Whom keys act for, as the store said a moment ago. Safe to call from any thread."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, KeyIdentity]] = OrderedDict()  # hash of the key -> when, whom

    def peek(self, secret: str) -> KeyIdentity | None:
        """What is known and fresh; never asks the store."""
        with self._lock:
            found = self._known.get(hash_key(secret))
        return found[1] if found is not None and self._clock() - found[0] < FRESH else None

    def look_up(self, secret: str) -> KeyIdentity | None:
        """Ask the store; ``None``: unknown or revoked.

        Raises:
            SQLAlchemyError: if the store does not answer and nothing recent is known.
        """
        digest = hash_key(secret)
        now = self._clock()
        try:
            with self._engine.connect() as c:
                identity = agents_of_key(c, secret)
        except SQLAlchemyError:
            with self._lock:
                found = self._known.get(digest)
            if found is None or now - found[0] > STALE:
                raise
            logger.warning("the store does not answer; a key is taken for what it was %.0f s ago", now - found[0])
            return found[1]
        with self._lock:
            self._known.pop(digest, None)
            if identity is not None:
                self._known[digest] = (now, identity)
                while len(self._known) > _CACHED:
                    self._known.popitem(last=False)
        return identity
