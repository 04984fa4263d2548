"""An agent's own training windows, as a form and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings import WindowSettings
from metaclaw_plugin.worker.modes import with_own
from metaclaw_plugin.worker.windows import check_windows


def window_fields(everyone: WindowSettings, own: Any) -> dict[str, dict[str, str]]:
    """What the form holds: for each field its own value, empty when the agent has none, and the general one."""
    mine = own if isinstance(own, Mapping) else {}
    general = everyone.model_dump()
    return {
        name: {"own": _text(mine.get(name)), "general": _text(general[name]) or "none"}
        for name in ("hours", "time_zone", "idle_after", "calendar")
    }


def read_windows(fields: Mapping[str, str], everyone: WindowSettings) -> dict[str, Any]:
    """The agent's own windows from the form, checked; empty: the general ones hold.

    Raises:
        ConfigError: if a field cannot be used; nothing is to be stored then.
    """
    own: dict[str, Any] = {}
    if hours := fields.get("hours", "").replace(",", " ").split():
        own["hours"] = hours
    for name in ("time_zone", "calendar"):
        if text := fields.get(name, "").strip():
            own[name] = text
    if idle := fields.get("idle_after", "").strip():
        try:
            own["idle_after"] = float(idle)
        except ValueError as error:
            raise ConfigError(f"idle: {idle[:40]!r} is no number of seconds") from error
    check_windows(with_own(everyone, own or None))
    return own


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
