"""What every task of the worker is given."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
from metaclaw_hooks.plugins import Plugins
from sqlalchemy.engine import Engine

from metaclaw_plugin.settings import Settings
from metaclaw_plugin.trainer_client import TrainerClient


@dataclass(frozen=True)
class WorkerContext:
    """Opened when the worker starts, closed when it ends."""

    settings: Settings
    engine: Engine
    plugins: Plugins
    trainer: TrainerClient
    http: httpx.AsyncClient
    owner: str  # under which this process holds leases
