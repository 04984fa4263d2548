"""Plugins and processes: what is called, what fails, what is wrong."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response

from metaclaw_plugin.console.access import Acting, Looking
from metaclaw_plugin.console.figures import worker_of
from metaclaw_plugin.console.house import House, house_of
from metaclaw_plugin.console.pages import page
from metaclaw_plugin.doctor.report import examine
from metaclaw_plugin.store.counters import read_counters

router = APIRouter()

MOST = 200  # counters on the page


@router.get("/health", name="health")
def health(request: Request, visitor: Looking) -> Response:
    return page(request, "health.html", visitor=visitor, **_values(house_of(request)))


@router.post("/health")
def examined(request: Request, action: Acting) -> Response:
    """The page with what the doctor says now. It asks every process, and takes seconds."""
    house = house_of(request)
    house.examined = (time.time(), tuple(examine(house.settings, house.config)))
    return page(request, "health.html", visitor=action.visitor, **_values(house))


def _values(house: House) -> dict[str, Any]:
    with house.reading() as c:
        counted = read_counters(c)
        running = house.glance.see(worker_of(c))
    at, findings = house.examined
    others = [
        (name, label, value)
        for name, labels in counted.items()
        if name not in ("hook_calls", "hook_failures", "hook_microseconds")
        for label, value in labels.items()
    ]
    return {
        "processes": running.processes,
        "problems": running.problems,
        "plugins": plugin_figures(counted),
        "folder": house.settings.hooks_path,
        "counters": others[:MOST],
        "examined_at": at,
        "findings": findings,
    }


def plugin_figures(counted: dict[str, dict[str, int]]) -> list[dict[str, Any]]:
    """Each plugin's hooks with calls, failures and mean time, those that fail first."""
    calls, failures, spent = (counted.get(f"hook_{name}", {}) for name in ("calls", "failures", "microseconds"))
    rows = []
    for label in sorted(calls.keys() | failures.keys()):
        plugin, _, hook = label.rpartition(":")
        number = calls.get(label, 0)
        milliseconds = spent.get(label, 0) / 1000 / number if number else None
        rows.append(
            {"plugin": plugin, "hook": hook, "calls": number, "failures": failures.get(label, 0), "ms": milliseconds}
        )
    return sorted(rows, key=lambda row: (-row["failures"], row["plugin"], row["hook"]))
