"""What plugins did, counted over all processes that share the store."""

from __future__ import annotations

from collections.abc import Mapping

from metaclaw_hooks.plugins import HookStats
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.counters import count_all


def add_hook_stats(c: Connection, fresh: Mapping[tuple[str, str], HookStats]) -> None:
    """Add calls, failures and microseconds by "plugin:hook"."""
    counts: dict[tuple[str, str], int] = {}
    for (plugin, hook), stats in fresh.items():
        label = f"{plugin}:{hook}"
        counts["hook_calls", label] = stats.calls
        counts["hook_microseconds", label] = round(stats.seconds * 1e6)
        if stats.failures:
            counts["hook_failures", label] = stats.failures
    count_all(c, counts)
