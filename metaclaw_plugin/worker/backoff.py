"""Pauses that grow while something fails."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

FIRST_PAUSE = 0.5  # seconds


@dataclass(slots=True)
class Backoff:
    """How something has been failing since it last worked."""

    delay: float = 0.0  # seconds, before jitter
    since: float | None = None  # monotonic: the first failure
    until: float = 0.0  # monotonic: not to be tried before

    def fail(self, longest: float) -> float:
        """Note a failure; returns the seconds to wait: doubling, with jitter so that several do not knock together."""
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        self.delay = min(longest, max(FIRST_PAUSE, self.delay * 2))
        pause = self.delay * random.uniform(0.5, 1.0)
        self.until = now + pause
        return pause

    @property
    def waiting(self) -> bool:
        """Whether it is too early to try again."""
        return time.monotonic() < self.until
