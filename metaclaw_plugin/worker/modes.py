"""Who may train now: the mode of each agent, and for ``auto`` its windows, told to the trainer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from metaclaw_hooks.types import Mode
from metaclaw_hooks.wire import AgentStatus, AgentTraining
from pydantic import ValidationError
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import ConfigError, TrainerRefusedError
from metaclaw_plugin.settings import Section, Settings, WindowSettings
from metaclaw_plugin.store.agents import list_agents
from metaclaw_plugin.store.schema import sessions
from metaclaw_plugin.worker.windows import Activity, Window, window_now

logger = logging.getLogger(__name__)

SectionT = TypeVar("SectionT", bound=Section)


class AgentTrainer(Protocol):
    """The part of the trainer's client that modes need."""

    async def agents(self) -> list[AgentStatus]: ...
    async def set_agent(self, agent: str, training: AgentTraining) -> AgentStatus: ...


class ModeContext(Protocol):
    """The part of the worker's context that modes need."""

    @property
    def settings(self) -> Settings: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def trainer(self) -> AgentTrainer: ...


async def modes_round(ctx: ModeContext) -> int:
    """Tell the trainer of each agent whose permission differs from what its mode says now; returns how many.

    What the trainer says it has is compared, not what it was last told, so that a trainer that lost it is told again.

    Raises:
        TrainerUnavailableError: if it does not answer; the next round says it again.
    """
    permissions = await asyncio.to_thread(training_permissions, ctx.settings, ctx.engine, time.time())
    has = {status.agent: status.allowed for status in await ctx.trainer.agents()}
    told = 0
    for agent, window in permissions.items():
        if has.pop(agent, None) is not window.open:
            try:
                await ctx.trainer.set_agent(agent, AgentTraining(allowed=window.open))
            except TrainerRefusedError as error:  # one agent's trouble is not the others'
                logger.warning("the trainer was told that %s is in %s, and refused: %s", agent, window.reason, error)
                continue
            logger.info("training of %s is %s: %s", agent, "allowed" if window.open else "held", window.reason)
            told += 1
    for agent in [agent for agent, allowed in has.items() if allowed]:  # removed here, still known there
        await ctx.trainer.set_agent(agent, AgentTraining(allowed=False))
        told += 1
    return told


def training_permissions(settings: Settings, engine: Engine, now: float) -> dict[str, Window]:
    """For each agent, whether it may be trained at ``now`` (Unix seconds) and why, or why not."""
    with engine.connect() as c:
        agents = {record.name: record for record in list_agents(c)}
        modes = {name: record.mode or settings.mode for name, record in agents.items()}
        automatic = [name for name, mode in modes.items() if mode is Mode.AUTO]
        everyone = c.scalar(sa.select(sa.func.max(sessions.c.last_at))) if automatic else None
        newest = {name: _last_request(c, name) for name in automatic}
    return {
        name: _permission(modes[name], settings.windows, record.settings, now, Activity(newest.get(name), everyone))
        for name, record in agents.items()
    }


def _last_request(c: sa.Connection, agent: str) -> float | None:
    last: float | None = c.scalar(sa.select(sa.func.max(sessions.c.last_at)).where(sessions.c.agent == agent))
    return last


def _permission(mode: Mode, windows: WindowSettings, own: Mapping[str, Any], now: float, activity: Activity) -> Window:
    if mode is Mode.RL:
        return Window(True, "mode rl")
    if mode is not Mode.AUTO:
        return Window(False, f"mode {mode}")
    try:
        return window_now(with_own(windows, own.get("windows")), now, activity)
    except ConfigError as error:
        return Window(False, str(error))


def with_own(section: SectionT, own: Any) -> SectionT:
    """``section`` with what the owner set for one agent alone.

    Raises:
        ConfigError: if a setting of the agent's is unknown or of the wrong type.
    """
    if own is None:
        return section
    try:
        return type(section).model_validate(section.model_dump() | dict(own))
    except (ValidationError, TypeError, ValueError) as error:
        raise ConfigError(f"the agent's own settings cannot be used: {' '.join(str(error).split())}") from error
