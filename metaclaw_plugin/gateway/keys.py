"""Whom keys act for, remembered for a few seconds.

What was found is believed briefly, so that a revoked key is soon refused, and for longer only while the store does not
answer. Our own keys are known by their sha256, LiteLLM's virtual keys by all that decides whom they act for.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from sqlalchemy.engine import Engine
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.gateway.asking import Asking
from metaclaw_plugin.gateway.identity import Identity, KeyFacts
from metaclaw_plugin.store.agents import KeyIdentity, agents_of_key, hash_key

logger = logging.getLogger(__name__)

T = TypeVar("T")
FRESH = 3.0  # seconds for which an answer of the store is believed
STALE = 600.0  # seconds for which it is believed while the store does not answer
_CACHED = 4096  # keys


class _Memory(Generic[T]):
    """What was found when. Safe to use from any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, tuple[float, T]] = OrderedDict()

    def get(self, name: Hashable, age: float) -> T | None:
        """What was found at most ``age`` seconds ago."""
        with self._lock:
            found = self._found.get(name)
        return found[1] if found is not None and self._clock() - found[0] < age else None

    def put(self, name: Hashable, value: T | None) -> None:
        """Remember it; ``None`` forgets."""
        with self._lock:
            self._found.pop(name, None)
            if value is not None:
                self._found[name] = (self._clock(), value)
                while len(self._found) > _CACHED:
                    self._found.popitem(last=False)


class KeyCache:
    """Whom our own keys act for, as the store said a moment ago.

    ``patience``: seconds that a request waits for the store; one that hangs is not waited for again for a while.
    """

    def __init__(self, engine: Engine, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._patience = patience
        self._clock = clock
        self._memory = _Memory[KeyIdentity](clock)
        self._asking = Asking("keys")
        self._silent_until = -math.inf

    async def look_up(self, secret: str) -> KeyIdentity | None:
        """What is known and fresh, else what the store says; ``None``: unknown or revoked.

        Raises:
            SQLAlchemyError, TimeoutError: if the store does not answer and nothing recent is known.
        """
        digest = hash_key(secret)
        silent = self._clock() < self._silent_until
        if (known := self._memory.get(digest, STALE if silent else FRESH)) is not None:
            return known
        try:
            return await self._asking.ask(lambda: self._ask_store(digest, secret), self._patience)
        except (SQLAlchemyError, TimeoutError):
            self._silent_until = self._clock() + FRESH
            if (known := self._memory.get(digest, STALE)) is None:
                raise
            logger.warning("the store does not answer; keys are taken for what they were a while ago")
            return known

    def _ask_store(self, digest: str, secret: str) -> KeyIdentity | None:
        with self._engine.connect() as c:
            identity = agents_of_key(c, secret)
        self._memory.put(digest, identity)
        return identity


_caches: dict[int, KeyCache] = {}


def key_cache(engine: Engine, patience: float) -> KeyCache:
    """The one of this process for ``engine``. It lives here, since LiteLLM may execute ``auth`` a second time."""
    if id(engine) not in _caches:
        _caches[id(engine)] = KeyCache(engine, patience)
    return _caches[id(engine)]


class VirtualKeyCache:
    """Whom LiteLLM's virtual keys act for, as the store said a moment ago."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._memory = _Memory[Identity](clock)

    def peek(self, key: KeyFacts, store_answers: bool = True) -> Identity | None:
        """What is known and fresh, or not too old while the store does not answer."""
        return self._memory.get(key.decisive, FRESH if store_answers else STALE)

    def note(self, key: KeyFacts, identity: Identity) -> None:
        """Remember what the store said."""
        self._memory.put(key.decisive, identity)
