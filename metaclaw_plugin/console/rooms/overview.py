"""All agents at a glance, and the same live."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy.exc import SQLAlchemyError

from metaclaw_plugin.console.access import Looking
from metaclaw_plugin.console.figures import agent_figures, worker_of
from metaclaw_plugin.console.house import House, house_of
from metaclaw_plugin.console.pages import fragment, page
from metaclaw_plugin.errors import MetaclawError
from metaclaw_plugin.store.agents import list_agents

router = APIRouter()

EVERY = 3.0  # seconds between looks for what changed
AGENTS = 50  # on a page


@router.get("/", name="overview")
def overview(request: Request, visitor: Looking, after: str = "") -> Response:
    return page(request, "overview.html", visitor=visitor, **look(house_of(request), after))


@router.get("/live/overview")
async def live_overview(request: Request, visitor: Looking, after: str = "") -> Response:
    """The table of the overview, sent again whenever something in it changed."""
    del visitor
    house = house_of(request)

    async def changes() -> AsyncIterator[str]:
        before = ""
        while not house.closing.is_set() and not await request.is_disconnected():
            text = await asyncio.to_thread(house.live.get, after)
            if text != before:
                before = text
                yield event("agents", text)
            else:
                yield ": still here\n\n"
            await asyncio.sleep(EVERY)

    return StreamingResponse(changes(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


def event(name: str, text: str) -> str:
    """A server-sent event; each line of ``text`` is a data line of its own."""
    return f"event: {name}\n" + "".join(f"data: {line}\n" for line in text.splitlines()) + "\n"


def table(house: House, after: str) -> str:
    try:
        return fragment("overview_agents.html", look(house, after))
    except (MetaclawError, SQLAlchemyError):
        return fragment("away.html", {})


def look(house: House, after: str) -> dict[str, Any]:
    """What the overview shows: one page of agents, the processes, and what is wrong."""
    with house.reading() as c:
        names = [record for record in list_agents(c) if record.name > after]
        running = house.glance.see(worker_of(c))
        now = time.time()
        shown = [agent_figures(c, record, house.settings, running, now) for record in names[:AGENTS]]
    return {
        "agents": shown,
        "next_after": shown[-1].name if len(names) > AGENTS else "",
        "first_page": not after,
        "processes": running.processes,
        "problems": running.problems,
    }
