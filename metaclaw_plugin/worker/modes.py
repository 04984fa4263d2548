"""Who may train now: the mode of each agent, and for ``auto`` its windows, told to the trainer."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import httpx
from metaclaw_hooks.types import Agent, Mode
from metaclaw_hooks.wire import AgentStatus, AgentTraining
from pydantic import ValidationError
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import CalendarError, ConfigError, TrainerRefusedError
from metaclaw_plugin.settings import Section, Settings
from metaclaw_plugin.store.agents import list_agents
from metaclaw_plugin.store.facts import set_fact
from metaclaw_plugin.store.last_requests import ANYONE, read_last_requests
from metaclaw_plugin.worker.calendars import Calendars
from metaclaw_plugin.worker.windows import Activity, Window, parse_zone, window_now

logger = logging.getLogger(__name__)

WINDOWS_FACT = "training_windows"  # agent -> {"open", "reason"}
LEASE = 60.0  # seconds that a window stays open in the trainer when nobody says so again: many rounds
REMOVED = Window(False, "the agent was removed")

SectionT = TypeVar("SectionT", bound=Section)


class AgentTrainer(Protocol):
    """The part of the trainer's client that modes need."""

    async def agents(self) -> list[AgentStatus]: ...
    async def set_agent(self, agent: str, training: AgentTraining) -> AgentStatus: ...


class WindowPlugins(Protocol):
    """The part of the plugins that modes need."""

    async def call(self, hook: str, /, **kwargs: Any) -> list[tuple[str, Any]]: ...


class ModeContext(Protocol):
    """The part of the worker's context that modes need."""

    @property
    def settings(self) -> Settings: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def trainer(self) -> AgentTrainer: ...
    @property
    def plugins(self) -> WindowPlugins: ...
    @property
    def http(self) -> httpx.AsyncClient: ...


class Modes:
    """Tells the trainer who may train. ``clock`` gives Unix seconds, so that a day can be tried in a moment."""

    def __init__(self, ctx: ModeContext, clock: Callable[[], float] = time.time) -> None:
        self._ctx = ctx
        self._clock = clock
        self._calendars = Calendars(ctx.http)
        self._shown: dict[str, Any] | None = None

    async def round(self) -> int:
        """Tell the trainer of each agent whose permission differs from what its mode says now; returns how many.

        What the trainer says it has is compared, not what it was last told, so that a trainer that lost it is told
        again. One that may not train any more ends its step and keeps what is queued. A window is told anew before what
        was told runs out, so that it shuts by itself when this worker is gone.

        Raises:
            TrainerUnavailableError: if it does not answer; the next round says it again.
        """
        permissions = await self.permissions()
        await asyncio.to_thread(self._show, permissions)
        has = {status.agent: status for status in await self._ctx.trainer.agents()}
        removed = {agent: REMOVED for agent, status in has.items() if status.allowed and agent not in permissions}
        told = [await self._tell(agent, window, has.get(agent)) for agent, window in (permissions | removed).items()]
        return sum(told)

    async def _tell(self, agent: str, window: Window, has: AgentStatus | None) -> bool:
        """Whether the trainer had to be told, and took it."""
        wanted = _training(window, self._clock())
        if has is not None and _holds(has, wanted):
            return False
        try:
            await self._ctx.trainer.set_agent(agent, wanted)
        except TrainerRefusedError as error:  # one agent's trouble is not the others'
            logger.warning("%s: %s, but the trainer refused to be told: %s", agent, window.reason, error)
            return False
        if has is None or has.allowed is not wanted.allowed:
            logger.info("training of %s is %s: %s", agent, "allowed" if wanted.allowed else "held", window.reason)
        return True

    async def permissions(self) -> dict[str, Window]:
        """For each agent, whether it may be trained now, and why, or why not."""
        now = self._clock()
        agents = await asyncio.to_thread(_look, self._ctx.settings, self._ctx.engine)
        windows = await asyncio.gather(*(self._apart(agent, own, activity, now) for agent, own, activity in agents))
        return {agent.name: window for (agent, _, _), window in zip(agents, windows, strict=True)}

    async def _apart(self, agent: Agent, own: Any, activity: Activity, now: float) -> Window:
        """One agent's window; what goes wrong with it shuts it, and no other's."""
        try:
            return await self._window(agent, own, activity, now)
        except Exception as error:  # isolation boundary: all others' windows must go on closing
            window = Window(False, f"its window could not be worked out ({type(error).__name__}): see the worker's log")
            if (self._shown or {}).get(agent.name, {}).get("reason") != window.reason:
                logger.exception("the window of %s could not be worked out and is kept shut", agent.name)
            return window

    async def _window(self, agent: Agent, own: Any, activity: Activity, now: float) -> Window:
        if agent.mode is Mode.RL:
            return Window(True, "mode rl", math.inf)
        if agent.mode is not Mode.AUTO:
            return Window(False, f"mode {agent.mode}")
        try:
            settings = with_own(self._ctx.settings.windows, own)
            window = window_now(settings, now, activity)
            if not window.open and settings.calendar is not None:
                zone = parse_zone(settings.time_zone)
                if (until := await self._calendars.busy_until(settings.calendar, zone, now)) is not None:
                    window = Window(True, "an event of the calendar", until)
        except (ConfigError, CalendarError) as error:
            window = Window(False, str(error))
        opinions = await self._ctx.plugins.call("training_window", agent=agent, now=now)
        for wanted in (False, True):  # who wants it shut goes before who wants it open
            if names := [plugin for plugin, opinion in opinions if opinion is wanted]:
                return Window(wanted, f"{'opened' if wanted else 'kept shut'} by {', '.join(names)}")
        return window

    def _show(self, permissions: Mapping[str, Window]) -> None:
        """Put it into the store for `metaclaw status`, when it changed."""
        shown = {agent: {"open": window.open, "reason": window.reason} for agent, window in permissions.items()}
        if shown != self._shown:
            with self._ctx.engine.begin() as c:
                set_fact(c, WINDOWS_FACT, shown)
            self._shown = shown


def _training(window: Window, now: float) -> AgentTraining:
    """What the trainer is told: a window holds for a while, or until it ends if that is sooner; mode rl for good."""
    if not window.open or window.until == math.inf:
        return AgentTraining(allowed=window.open)
    left = LEASE if window.until is None else min(LEASE, window.until - now)
    return AgentTraining(allowed=True, allowed_for=left) if left > 0 else AgentTraining(allowed=False)


def _holds(has: AgentStatus, wanted: AgentTraining) -> bool:
    """Whether what the trainer has will do for now."""
    if has.allowed is not wanted.allowed:
        return False
    if has.allowed_for is None or wanted.allowed_for is None:
        return has.allowed_for is wanted.allowed_for
    return abs(has.allowed_for - wanted.allowed_for) <= LEASE / 2


def _look(settings: Settings, engine: Engine) -> list[tuple[Agent, Any, Activity]]:
    """All agents with the windows that the owner set for each alone, and when requests came last."""
    with engine.connect() as c:
        agents = [(record.agent(settings.mode), record.settings.get("windows")) for record in list_agents(c)]
        seen = read_last_requests(c)
    return [(agent, own, Activity(seen.get(agent.name), seen.get(ANYONE))) for agent, own in agents]


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
