"""Keeps loaded plugins like their folder while a process runs, and passes on what they did."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from metaclaw_hooks.plugins import HookStats, Plugins

logger = logging.getLogger(__name__)

Report = Callable[[Mapping[tuple[str, str], HookStats]], None]


class FolderWatch:
    """A thread that reads the folder of ``plugins`` again every ``interval`` seconds.

    ``report`` is given what each hook did since the last time, by (plugin, hook), every ``report_every`` seconds.
    """

    def __init__(
        self, plugins: Plugins, interval: float = 1.0, report: Report | None = None, report_every: float = 10.0
    ) -> None:
        self._plugins = plugins
        self._interval = interval
        self._report = report
        self._report_every = report_every
        self._reported_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metaclaw-hooks-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what it has not reported yet is reported."""
        self._stop.set()
        self._thread.join(timeout=5)
        self._tell()

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            try:
                self._plugins.refresh()
            except Exception:  # the watch must outlive anything that a strange file does
                logger.exception("the folder of plugins could not be read again; trying again")
            if time.monotonic() >= self._reported_at + self._report_every:
                self._reported_at = time.monotonic()
                self._tell()

    def _tell(self) -> None:
        if self._report is None or not (fresh := self._plugins.take_stats()):
            return
        try:
            self._report(fresh)
        except Exception:  # whoever listens may be away; figures are worth no more than that
            calls = sum(stats.calls for stats in fresh.values())
            logger.exception("what %d calls of plugins came to could not be counted", calls)
