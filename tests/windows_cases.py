"""What tests of windows share: a worker's context on a clock of its own, and a trainer that notes what it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
from metaclaw_hooks.types import Mode
from metaclaw_hooks.wire import AgentStatus, AgentTraining
from sqlalchemy.engine import Engine

from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.worker.modes import Modes

BERLIN = ZoneInfo("Europe/Berlin")


def at(text: str) -> float:
    """Berlin time as Unix seconds."""
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN).timestamp()


@dataclass
class Told:
    """A trainer that remembers what it is told."""

    allowed: dict[str, bool] = field(default_factory=dict)
    left: dict[str, float | None] = field(default_factory=dict)  # seconds that this holds; None: for good
    calls: int = 0

    async def agents(self) -> list[AgentStatus]:
        return [
            AgentStatus(
                agent=name,
                allowed=allowed,
                allowed_for=self.left[name],
                queued=0,
                batch_size=8,
                set_aside=0,
                trained=0,
                step=0,
                head=0,
                newest=0,
                training=False,
                idle_reason=None,
                metrics={},
            )
            for name, allowed in self.allowed.items()
        ]

    async def set_agent(self, agent: str, training: AgentTraining) -> AgentStatus:
        self.calls += 1
        self.allowed[agent] = bool(training.allowed)
        self.left[agent] = training.allowed_for
        return next(status for status in await self.agents() if status.agent == agent)


@dataclass
class Plugins:
    """Opinions about windows, by plugin name."""

    opinions: list[tuple[str, bool]] = field(default_factory=list)

    async def call(self, hook: str, /, **kwargs: Any) -> list[tuple[str, Any]]:
        assert hook == "training_window"
        assert kwargs["agent"].mode is Mode.AUTO
        return self.opinions


@dataclass
class Context:
    settings: Settings
    engine: Engine
    trainer: Told
    plugins: Plugins
    http: httpx.AsyncClient
    now: float = 0.0

    @property
    def modes(self) -> Modes:
        return Modes(self, clock=lambda: self.now)


def make_context(folder: Path) -> Context:
    """On a store in ``folder``, in mode rl."""
    engine = open_store(f"sqlite:///{folder / 'metaclaw.db'}")
    return Context(Settings(home=folder, mode=Mode.RL), engine, Told(), Plugins(), httpx.AsyncClient(verify=False))
