"""Agents whose windows go wrong, beside others that must not notice."""

from __future__ import annotations

from pathlib import Path

import pytest
from metaclaw_hooks.types import Mode

from metaclaw_plugin.store.agents import add_agent, set_settings
from metaclaw_plugin.store.facts import get_fact
from metaclaw_plugin.worker.calendars import Calendars
from metaclaw_plugin.worker.modes import WINDOWS_FACT
from tests.windows_cases import Context, at, make_context


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return make_context(tmp_path)


async def test_one_agents_calendar_shuts_its_own_window_alone(ctx: Context, tmp_path: Path) -> None:
    event = "BEGIN:VEVENT\nUID:e\nDTSTART:99991231T230000Z\nDURATION:P2D\nEND:VEVENT"
    (tmp_path / "late.ics").write_text(f"BEGIN:VCALENDAR\n{event}\nEND:VCALENDAR\n", encoding="utf-8")
    calendars = {
        "late": str(tmp_path / "late.ics"),
        "home": "~no-such-user-here.ics",
        "port": "http://x:abc/c.ics",
        "nowhere": str(tmp_path / "none.ics"),
    }
    with ctx.engine.begin() as c:
        for name in ("ada", *calendars):
            add_agent(c, name, Mode.AUTO)
            set_settings(c, name, {"windows": {"calendar": calendars.get(name)}})
        set_settings(c, "ada", {"windows": {"hours": ["12:00-13:00"], "time_zone": "Europe/Berlin"}})
    ctx.now = at("2026-11-22T12:30:00")
    modes = ctx.modes
    await modes.round()
    assert ctx.trainer.allowed == {"ada": True, "late": False, "home": False, "port": False, "nowhere": False}
    ctx.now = at("2026-11-22T13:00:00")
    await modes.round()
    assert not ctx.trainer.allowed["ada"]
    with ctx.engine.connect() as c:
        shown = get_fact(c, WINDOWS_FACT)
    assert "no valid iCalendar text (OverflowError)" in shown["late"]["reason"]
    assert "name of no user" in shown["home"]["reason"]
    assert "no URL" in shown["port"]["reason"]
    assert "cannot be read: No such file" in shown["nowhere"]["reason"]


async def test_what_nobody_foresaw_shuts_one_window_and_is_told(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    async def burst(*given: object) -> None:
        raise ZeroDivisionError

    with ctx.engine.begin() as c:
        for name in ("ada", "bob"):
            add_agent(c, name, Mode.AUTO)
        set_settings(c, "ada", {"windows": {"calendar": "/c.ics"}})
        set_settings(c, "bob", {"windows": {"idle_after": 60}})
    monkeypatch.setattr(Calendars, "busy_until", burst)
    found = await ctx.modes.permissions()
    assert (found["ada"].open, found["bob"].open) == (False, True)
    assert "ZeroDivisionError" in found["ada"].reason
