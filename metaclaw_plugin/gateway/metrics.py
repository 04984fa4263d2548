"""What the gateway counts, for Prometheus. Several worker processes share a folder, and any of them speaks for all."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SHARED_FOLDER_ENV = "PROMETHEUS_MULTIPROC_DIR"  # read by prometheus_client when it is imported


class Metrics:
    """Counters and timings; ``render`` gives them in Prometheus' text form."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._events = Counter(
            "metaclaw_events", "Things that happened, by name and agent", ["name", "agent"], registry=self.registry
        )
        self._commits = Histogram(
            "metaclaw_commit_seconds",
            "Seconds that an answer's last byte waited for its trace to be committed",
            ["stored"],
            registry=self.registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
        )

    def count(self, name: str, agent: str, n: int) -> None:
        """Count ``n`` more of ``name`` for ``agent``."""
        self._events.labels(name, agent).inc(n)

    def committed(self, stored: str, seconds: float) -> None:
        """An answer's wait for its trace ended after ``seconds``: "yes", "no" (not in time) or "over_quota"."""
        self._commits.labels(stored).observe(seconds)

    def render(self) -> bytes:
        """All of it as Prometheus reads it, of all worker processes."""
        if not os.environ.get(SHARED_FOLDER_ENV):
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
