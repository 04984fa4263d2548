"""The processes, asked at most every few seconds however many pages are open."""

from __future__ import annotations

import threading
import time

from metaclaw_plugin.settings import Settings
from metaclaw_plugin.status.collect import Running, look_at_processes
from metaclaw_plugin.status.why import TrainerView

FRESH = 3.0  # seconds


class Glance:
    """What was seen last. A page never waits for a process: it shows what is there while others look anew."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._seen = Running((), TrainerView({}, "was not asked yet"), False, None, ())
        self._at = -FRESH
        self._lock = threading.Lock()

    def see(self, worker: tuple[str, float] | None) -> Running:
        """The processes as of a few seconds ago; ``worker`` is who was last at work, and when, by the store."""
        if time.monotonic() - self._at >= FRESH and self._lock.acquire(blocking=False):
            self._at = time.monotonic()
            threading.Thread(target=self._look, args=(worker,), name="glance", daemon=True).start()
        return self._seen

    def look_now(self, worker: tuple[str, float] | None) -> Running:
        """The processes as they are now; takes as long as the slowest may (``probes.TIMEOUT``)."""
        self._seen = look_at_processes(self._settings, worker)
        self._at = time.monotonic()
        return self._seen

    def _look(self, worker: tuple[str, float] | None) -> None:
        try:
            self._seen = look_at_processes(self._settings, worker)
        finally:
            self._lock.release()
