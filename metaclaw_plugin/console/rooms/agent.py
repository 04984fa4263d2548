"""One agent: its curves, versions, skills, conversations and settings."""

from __future__ import annotations

import logging
import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from metaclaw_hooks.types import Mode
from sqlalchemy.engine import Connection

from metaclaw_plugin.console.access import Acting, Looking
from metaclaw_plugin.console.curves import learning_curve, lineage, training_curves
from metaclaw_plugin.console.figures import agent_figures, worker_of
from metaclaw_plugin.console.house import House, house_of
from metaclaw_plugin.console.pages import back, page
from metaclaw_plugin.console.window_form import read_windows, window_fields
from metaclaw_plugin.errors import ConfigError, VersionStateError
from metaclaw_plugin.skills.ledger import read_ledger
from metaclaw_plugin.store.adapters import get_route, list_versions
from metaclaw_plugin.store.agents import AgentRecord, get_record, set_mode, set_settings
from metaclaw_plugin.store.recent import Newest, newest_traces, newest_version_numbers, reward_history
from metaclaw_plugin.store.wishes import promote, rollback

logger = logging.getLogger(__name__)
router = APIRouter(prefix="/agents/{name}")

VERSIONS = 30  # in the table
CURVE_VERSIONS = 300  # in the training curves
TRACES = 200  # that one page of conversations is gathered from

Name = Annotated[str, Path(max_length=63)]


@router.get("")
def agent(request: Request, name: Name, visitor: Looking) -> Response:
    house = house_of(request)
    with house.reading() as c:
        record = get_record(c, name)
        running = house.glance.see(worker_of(c))
        figures = agent_figures(c, record, house.settings, running, time.time())
        numbers = newest_version_numbers(c, name, VERSIONS + 1)
        versions = list_versions(c, name, since=numbers[-1]) if numbers else []
        talks = conversations(newest_traces(c, name, TRACES))
        route = get_route(c, name)
        skills = _skills(c, house, name)
    parents = {record.version.number: record.version.parent for record in versions}
    return page(
        request,
        "agent.html",
        visitor=visitor,
        agent=figures,
        record=record,
        global_mode=(record.global_mode or house.settings.mode).value,
        modes=[mode.value for mode in Mode],
        versions=list(reversed(versions))[:VERSIONS],
        more_versions=len(numbers) > VERSIONS,
        lineages={number: lineage(number, parents) for number in parents},
        route=route,
        conversations=talks[:15],
        skills=skills,
        windows=window_fields(house.settings.windows, record.settings.get("windows")),
    )


@router.get("/curves")
def curves(request: Request, name: Name, visitor: Looking) -> dict[str, Any]:
    """The numbers of both charts, for the script that draws them."""
    del visitor
    with house_of(request).reading() as c:
        get_record(c, name)
        history = reward_history(c, name)
        numbers = newest_version_numbers(c, name, CURVE_VERSIONS)
        versions = list_versions(c, name, since=numbers[-1]) if numbers else []
    return {"learning": learning_curve(history, versions), "training": training_curves(versions)}


@router.get("/conversations")
def all_conversations(
    request: Request, name: Name, visitor: Looking, before: Annotated[int | None, Query(ge=0, le=2**62)] = None
) -> Response:
    with house_of(request).reading() as c:
        get_record(c, name)
        traces = newest_traces(c, name, TRACES, before)
    last = traces[-1].seq if len(traces) == TRACES else None
    return page(
        request,
        "conversations.html",
        visitor=visitor,
        name=name,
        conversations=conversations(traces),
        before=last,
        first_page=before is None,
    )


def conversations(traces: list[Newest]) -> list[dict[str, Any]]:
    """The sessions of ``traces`` (newest first), each with what of it is among them."""
    found: dict[str, dict[str, Any]] = {}
    for trace in traces:
        fresh = {"last_at": trace.finished_at, "turns": 0, "rewards": [], "version": 0, "kind": "side"}
        row = found.setdefault(trace.session, {"id": trace.session, **fresh})
        row["turns"] = max(row["turns"], trace.turn + 1)
        row["version"] = max(row["version"], trace.adapter_version)
        if trace.kind == "main":
            row["kind"] = "main"
        if trace.reward is not None:
            row["rewards"].append(trace.reward)
    for row in found.values():
        rewards = row.pop("rewards")
        row["reward"] = sum(rewards) / len(rewards) if rewards else None
    return list(found.values())


def _skills(c: Connection, house: House, name: str) -> list[dict[str, Any]]:
    """The skills that were used or measured for the agent, and its own, with their uplift."""
    ledger = read_ledger(c, name)
    own = house.library.skills_of(name)
    uses = {skill: entry.uses for skill, entry in ledger.items()}
    names = sorted(uses.keys() | own.keys(), key=lambda skill: (-uses.get(skill, 0), skill))
    return [
        {"name": skill, "own": skill in own, "summary": ledger[skill].summary if skill in ledger else "not used yet"}
        for skill in names[:30]
    ]


@router.post("/promote")
def put_in_place(request: Request, name: Name, action: Acting) -> Response:
    number = _number(action.text("version"))
    with house_of(request).writing() as c:
        get_record(c, name)
        said = promote(c, name, number)
    logger.info("console: version %d of %s is promoted", number, name)
    return back(request, f"/agents/{name}#versions", said)


@router.post("/rollback")
def take_back(request: Request, name: Name, action: Acting) -> Response:
    to = action.text("to")
    with house_of(request).writing() as c:
        get_record(c, name)
        said = rollback(c, name, _number(to) if to else None)
    logger.info("console: what serves %s is rolled back", name)
    return back(request, f"/agents/{name}#versions", said)


@router.post("/settings")
def settings(request: Request, name: Name, action: Acting) -> Response:
    house = house_of(request)
    mode = action.text("mode")
    if mode and mode not in {choice.value for choice in Mode}:
        raise ConfigError(f"mode is one of {', '.join(Mode)}, or the global one")
    windows = read_windows(action.fields, house.settings.windows)
    with house.writing() as c:
        record = get_record(c, name)
        set_mode(c, name, Mode(mode) if mode else None)
        set_settings(c, name, _with_windows(record, windows))
    logger.info("console: mode and windows of %s are set", name)
    return back(request, f"/agents/{name}#settings", "saved; the worker takes it up within seconds")


def _with_windows(record: AgentRecord, windows: dict[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in record.settings.items() if name != "windows"}
    return others | ({"windows": windows} if windows else {})


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise VersionStateError(f"{text[:40]!r} is no version number")
    return int(text)
