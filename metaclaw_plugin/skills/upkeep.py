"""What the worker does about skills, round by round: keep failures, evolve when it is time, count, retire."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time

import httpx
from metaclaw_hooks.types import Agent, Mode
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import ConfigError, SkillError
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.skills.editing import SkillFolder
from metaclaw_plugin.skills.edits import Change
from metaclaw_plugin.skills.evolution import Evolution, apply_changes
from metaclaw_plugin.skills.ledger import LedgerEntry, refresh_ledger
from metaclaw_plugin.skills.opening import open_library
from metaclaw_plugin.skills.support import RoundRecord, failures, is_due, reserve_support
from metaclaw_plugin.store import leases
from metaclaw_plugin.store.agents import get_agent, list_agents
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.worker.context import WorkerContext

log = logging.getLogger(__name__)

LEDGER_EVERY = 60.0  # seconds between counts
_GRACE = 60.0  # seconds that a lease lasts beyond the evolver's time-out


class SkillKeeper:
    """The worker's task for skills. Several workers may run it: an agent is evolved by one at a time."""

    def __init__(self, ctx: WorkerContext) -> None:
        self._ctx = ctx
        self._library = open_library(ctx.settings)
        self._evolution = Evolution(ctx.settings, ctx.engine, ctx.http, self._library)
        self._looked: dict[str, float] = {}  # agent -> failures scored up to then were looked at
        self._counted = 0.0

    async def round(self) -> int:
        """Do what is due for every agent; returns how many evolution rounds that took."""
        agents = await asyncio.to_thread(self._look)
        done = 0
        for agent in agents if self._ctx.settings.skills.evolution.model else []:
            if await asyncio.to_thread(self._start, agent):
                try:
                    done += await self._evolution.evolve(agent) is not None
                finally:
                    await asyncio.to_thread(self._end, agent)
        if time.monotonic() - self._counted > LEDGER_EVERY:
            for agent in agents:
                await asyncio.to_thread(self._count, agent)
            self._counted = time.monotonic()
        return done

    def _look(self) -> list[Agent]:
        self._library.refresh()
        counts = self._library.take_counts()
        if counts:
            with self._ctx.engine.begin() as c:
                for (name, label), number in counts.items():
                    count(c, name, label, number)
        with self._ctx.engine.connect() as c:
            records = list_agents(c)
        agents = [record.agent(self._ctx.settings.mode) for record in records]
        return [agent for agent in agents if agent.mode is not Mode.OFF]

    def _start(self, agent: Agent) -> bool:
        """Keep new failures for the evolver; true if it should be asked now, and nobody else is about to."""
        evolution = self._ctx.settings.skills.evolution
        now = time.time()
        since = self._looked.get(agent.name, 0.0)
        with self._ctx.engine.connect() as c:
            fresh = bool(failures(c, agent.name, evolution.failure_reward, since))
        if fresh:
            with self._ctx.engine.begin() as c:
                reserve_support(c, agent, evolution, now, since)
        self._looked[agent.name] = now - 1.0  # a score may be committed a little after its time
        with self._ctx.engine.connect() as c:
            if not is_due(c, agent.name, evolution, now):
                return False
        with self._ctx.engine.begin() as c:
            return leases.acquire(c, _lease(agent), self._ctx.owner, now, evolution.timeout + _GRACE)

    def _end(self, agent: Agent) -> None:
        with self._ctx.engine.begin() as c:
            leases.release(c, _lease(agent), self._ctx.owner)

    def _count(self, agent: Agent) -> None:
        with self._ctx.engine.begin() as c:
            entries = refresh_ledger(c, agent.name)
        least = self._ctx.settings.skills.evolution.retire_uses
        if least is None:
            return
        for entry in entries:
            if entry.hurts and min(entry.with_.n, entry.without.n) >= least:
                self._retire(agent, entry)

    def _retire(self, agent: Agent, entry: LedgerEntry) -> None:
        """Take out an evolved skill that hurts; propose it for one that a person wrote, and for all in review."""
        skill = self._library.view(agent.name).skills.get(entry.skill)
        if skill is None or skill.shared:
            return
        folder = SkillFolder(self._library.root, agent.name)
        change = Change("retire", skill.name, None, (skill.name,), f"it hurts: {entry.summary}")
        record = RoundRecord(
            id=f"ev-{secrets.token_hex(8)}",
            agent=agent.name,
            state="applied",
            model="ledger",
            prompt_version="-",
            trace_ids=[],
            detail={"accepted": [{"action": "retire", "name": skill.name, "reason": change.reason}]},
            generation=agent.skill_generation,
            seconds=0.0,
            at=time.time(),
        )
        evolved = skill.metadata.get("origin") == "evolved"
        if evolved and self._ctx.settings.skills.evolution.approval == "auto":
            apply_changes(self._ctx.engine, folder, [change], record)
            self._library.refresh()
        elif not folder.was_proposed(change):
            folder.propose(change, record.id)
            log.warning(
                "skill %s of %s hurts (%s); see `metaclaw skills review`", skill.name, agent.name, entry.summary
            )


def _lease(agent: Agent) -> str:
    return f"evolve:{agent.name}"


async def evolve_now(settings: Settings, engine: Engine, http: httpx.AsyncClient, name: str) -> RoundRecord | None:
    """Ask the evolver about agent ``name`` at once, whatever the triggers say; ``None``: there is no failure to show.

    Raises:
        ConfigError: if no model is configured for it.
        UnknownAgentError: if there is no such agent.
        SkillError: if a worker is asking about this agent at this moment.
    """
    evolution = settings.skills.evolution
    if evolution.model is None:
        raise ConfigError("no model writes skills yet; set metaclaw.skills.evolution.model")
    owner = leases.this_worker()
    now = time.time()
    with engine.begin() as c:
        agent = get_agent(c, name, settings.mode)
        if not leases.acquire(c, _lease(agent), owner, now, evolution.timeout + _GRACE):
            raise SkillError(f"a worker is evolving skills of {name} just now; try again in a minute")
        reserve_support(c, agent, evolution, now)
    try:
        return await Evolution(settings, engine, http, open_library(settings)).evolve(agent)
    finally:
        with engine.begin() as c:
            leases.release(c, _lease(agent), owner)
