"""What one gateway process holds: its settings and its door to the store. LiteLLM gives no place to put them."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from sqlalchemy.engine import Engine

from metaclaw_plugin.settings import Settings, load_settings
from metaclaw_plugin.store.checkpointing import checkpoint_beside
from metaclaw_plugin.store.engine import open_store


@dataclass(frozen=True, slots=True)
class GatewayProcess:
    """Settings of ``$METACLAW_CONFIG`` and the store that they name."""

    settings: Settings
    engine: Engine


_LONGEST = 30.0  # seconds for a statement: past all that requests and their traces wait for

_lock = threading.Lock()
_held: list[GatewayProcess] = []


def this_process() -> GatewayProcess:
    """The one of this process; opened by whoever asks first, after any fork.

    Raises:
        ConfigError: if the settings cannot be read.
        StoreError: if the store cannot be opened; the next call tries again.
    """
    with _lock:
        if not _held:
            settings = load_settings()
            engine = open_store(settings.store_url, _LONGEST)
            checkpoint_beside(engine)
            _held.append(GatewayProcess(settings, engine))
        return _held[0]
