"""The garbage collector runs between the steps of requests, never inside one.

Before Python 3.12 it runs at any allocation, also inside ``ContextVar.set``. A finaliser that sets a variable there, as
that of LiteLLM's streams does, frees what the outer call is still reading: a request loses its variables, or the
process dies (https://github.com/python/cpython/issues/148891). So it is switched off here, and called from the event
loop, at which time no variable is being set.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time

AT_FAULT = sys.version_info < (3, 12)  # from then on the interpreter itself waits for the end of such calls

_EVERY = 0.1  # seconds
# Rounds through everything hold all requests up. What LiteLLM leaves of a stream is found by them alone, so they are
# short if they come often; but what lives costs its time in each.
_FULL_PAUSE = (1.0, 10.0)  # seconds between two of them: at least, at most
_FULL_SHARE = 0.05  # of the time, in between


class Collector:
    """Does what the interpreter's collector would do, a little at a time, when it is told to."""

    def __init__(self) -> None:
        self._full_at = time.monotonic()  # when the next round through everything is due

    async def run(self, every: float = _EVERY) -> None:
        """Take over from the interpreter's collector; a task that ends gives it back."""
        gc.disable()
        try:
            while True:
                await asyncio.sleep(every)
                self.collect_if_due()
        finally:
            gc.enable()

    def collect_if_due(self) -> int | None:
        """Collect the oldest generation that is due; which one it was."""
        young, middle, _ = gc.get_count()
        at_most = gc.get_threshold()
        if young <= at_most[0]:
            return None
        started = time.monotonic()
        if started < self._full_at:
            generation = 0 if middle <= at_most[1] else 1
            gc.collect(generation)
            return generation
        gc.collect(2)
        ended = time.monotonic()
        shortest, longest = _FULL_PAUSE
        self._full_at = ended + min(max((ended - started) / _FULL_SHARE, shortest), longest)
        return 2
