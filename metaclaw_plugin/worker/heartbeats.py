"""Which gateway processes are dead, told without trusting any clock but our own steady one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class HeartbeatWatch:
    """Watches stamps that living processes keep changing.

    A process is dead when its stamp has stood still for ``dead_after`` seconds of this process's monotonic clock. The
    stamps themselves are only compared for equality, so clocks that differ or jump do no harm.
    """

    def __init__(self, dead_after: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._dead_after = dead_after
        self._clock = clock
        self._seen: dict[str, tuple[float, float]] = {}  # process -> stamp, and when we first saw it

    def dead(self, stamps: Mapping[str, float]) -> list[str]:
        """The processes of ``stamps`` (process -> newest stamp) that are dead. Call it at least every few seconds."""
        now = self._clock()
        self._seen = {
            process: self._seen[process] if self._seen.get(process, (None, 0.0))[0] == stamp else (stamp, now)
            for process, stamp in stamps.items()
        }
        return [process for process, (_, since) in self._seen.items() if now - since >= self._dead_after]
