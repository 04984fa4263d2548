"""Something that many open pages ask for, made once for all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """The value of ``make(key)``, at most ``fresh`` seconds old; ``most`` keys are remembered."""

    def __init__(self, make: Callable[[str], T], fresh: float, most: int = 32) -> None:
        self._make = make
        self._fresh = fresh
        self._most = most
        self._made: dict[str, tuple[float, T]] = {}
        self._lock = threading.Lock()

    def get(self, key: str = "") -> T:
        with self._lock:
            at, value = self._made.get(key, (-self._fresh, None))
            if value is None or time.monotonic() - at >= self._fresh:
                value = self._make(key)
                self._made.pop(key, None)
                self._made[key] = (time.monotonic(), value)
                while len(self._made) > self._most:
                    self._made.pop(next(iter(self._made)))
            return value

    def forget(self) -> None:
        """Make everything anew when it is asked for next."""
        with self._lock:
            self._made.clear()
