"""What plugins did, counted over all processes that share the store."""

from __future__ import annotations

from collections.abc import Mapping

from metaclaw_hooks.plugins import HookStats
from sqlalchemy.engine import Connection

from metaclaw_plugin.store.counters import count


def add_hook_stats(c: Connection, fresh: Mapping[tuple[str, str], HookStats]) -> None:
    """Add calls, failures and microseconds by "plugin:hook"."""
    for (plugin, hook), stats in sorted(fresh.items()):
        label = f"{plugin}:{hook}"
        count(c, "hook_calls", label, stats.calls)
        count(c, "hook_microseconds", label, round(stats.seconds * 1e6))
        if stats.failures:
            count(c, "hook_failures", label, stats.failures)
