"""How much a request may hold. The length of its body is watched at the edge."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metaclaw_plugin.settings import GatewaySettings


def too_many(data: Mapping[str, Any], settings: GatewaySettings) -> str | None:
    """What the request has too much of, and what to do about it; ``None`` if it is within limits."""
    limits = (("messages", settings.max_messages), ("input", settings.max_messages), ("tools", settings.max_tools))
    for name, limit in limits:
        value = data.get(name)
        if isinstance(value, list) and len(value) > limit:
            setting = "max_tools" if name == "tools" else "max_messages"
            return (
                f"{len(value)} {name} in one request, {limit} at most; send fewer, or raise metaclaw.gateway.{setting}"
            )
    return None
