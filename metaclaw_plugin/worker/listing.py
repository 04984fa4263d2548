"""Shows agents where LiteLLM's users look: ``metaclaw/<agent>@vN``, what serves, on the Models page, and the agent as
the alias of its keys on the Virtual Keys page. In LiteLLM's database mode, with its master key, and only for looking.
"""

from __future__ import annotations

import asyncio
import logging
import time

from metaclaw_plugin.errors import LitellmAdminError
from metaclaw_plugin.litellm_admin import Listing, LitellmAdmin, VirtualKey, free_alias
from metaclaw_plugin.store import leases
from metaclaw_plugin.store.adapters import list_routes
from metaclaw_plugin.store.agents import list_agents
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.worker.context import WorkerContext

logger = logging.getLogger(__name__)

LOOK_AGAIN = 60.0  # seconds after which LiteLLM is asked what it has, since people may change it there
LEASE, LEASE_SECONDS = "litellm-listing", 60.0


class Lister:
    """Keeps LiteLLM's pages true. It remembers what it said, and asks LiteLLM only when something changed."""

    def __init__(self, ctx: WorkerContext) -> None:
        self._ctx = ctx
        self._admin = LitellmAdmin(ctx.http, ctx.settings)
        self._told: dict[str, Listing] = {}
        self._looked = -LOOK_AGAIN
        self._trouble = ""

    async def round(self) -> bool:
        """Tell LiteLLM what changed. A LiteLLM that cannot be told is logged once and counted; the next round tries."""
        try:
            await self._once()
            self._trouble = ""
        except LitellmAdminError as error:
            self._told, self._looked = {}, -LOOK_AGAIN
            if str(error) != self._trouble:
                logger.warning("the agents cannot be shown in LiteLLM's admin UI: %s", error)
            self._trouble = str(error)
            await asyncio.to_thread(self._count_failure)
        return False

    async def _once(self) -> None:
        wanted = await asyncio.to_thread(self._wanted)
        fresh = time.monotonic() - self._looked < LOOK_AGAIN
        if fresh and wanted == self._told:
            return
        if not await asyncio.to_thread(self._is_mine):
            return
        if not fresh:
            self._told = await self._admin.listings()
            await self._name_keys(wanted)
            self._looked = time.monotonic()
        for agent, listing in wanted.items():
            if self._told.get(agent) != listing:
                await self._admin.put(listing)
                self._told[agent] = listing
                logger.info("LiteLLM's Models page shows %s", listing.model)
        for agent in self._told.keys() - wanted.keys():
            await self._admin.drop(agent)
            del self._told[agent]

    async def _name_keys(self, wanted: dict[str, Listing]) -> None:
        """Give keys that say their agent in the metadata, and have no alias, the agent for an alias."""
        keys = await self._admin.virtual_keys()
        taken = {key.alias for key in keys if key.alias}
        for key in keys:
            agent = _agent_of(key)
            if not key.alias and agent in wanted:
                alias = free_alias(agent, taken)
                await self._admin.set_alias(key, alias)
                taken.add(alias)

    def _wanted(self) -> dict[str, Listing]:
        with self._ctx.engine.connect() as c:
            versions = {route.agent: route.version for route in list_routes(c)}
            agents = list_agents(c)
        mode = self._ctx.settings.mode
        return {
            record.name: Listing(record.name, versions.get(record.name, 0), record.effective_mode(mode).value)
            for record in agents
        }

    def _is_mine(self) -> bool:
        """Whether no other worker is at it: two that make the same entry at once would meet with an error."""
        with self._ctx.engine.begin() as c:
            return leases.acquire(c, LEASE, self._ctx.owner, time.time(), LEASE_SECONDS)

    def _count_failure(self) -> None:
        with self._ctx.engine.begin() as c:
            count(c, "worker_failures", "listing")


def _agent_of(key: VirtualKey) -> str:
    """The agent that a key acts for unless the request chooses another; empty: none."""
    named = key.metadata.get("agent_id")
    first = named[0] if isinstance(named, list) and named else named
    return first if isinstance(first, str) else ""
