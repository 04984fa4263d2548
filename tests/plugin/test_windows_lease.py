"""How long the trainer is told that a window is open: no longer than it surely is, and never for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from metaclaw_hooks.types import Mode

from metaclaw_plugin.settings import WindowSettings
from metaclaw_plugin.store.agents import add_agent, remove_agent, set_mode, set_settings
from metaclaw_plugin.worker.modes import LEASE
from metaclaw_plugin.worker.windows import Activity, window_now
from tests.windows_cases import Context, at, make_context

EVENT = "BEGIN:VEVENT\nUID:e\nDTSTART:20261122T120000\nDTEND:20261122T123020\nEND:VEVENT"


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    (tmp_path / "work.ics").write_text(f"BEGIN:VCALENDAR\nVERSION:2.0\n{EVENT}\nEND:VCALENDAR\n", encoding="utf-8")
    ctx = make_context(tmp_path)
    windows: dict[str, dict[str, Any]] = {
        "asleep": {"hours": ["12:00-12:31"]},
        "idle": {"idle_after": 60},
        "busy": {"calendar": str(tmp_path / "work.ics")},
    }
    with ctx.engine.begin() as c:
        for name, own in windows.items():
            add_agent(c, name, Mode.AUTO)
            set_settings(c, name, {"windows": {"time_zone": "Europe/Berlin"} | own})
        add_agent(c, "steady", Mode.RL)
        add_agent(c, "never", Mode.SKILLS_ONLY)
    ctx.now = at("2026-11-22T12:15:00")
    return ctx


async def test_windows_hold_for_a_while_and_mode_rl_for_good(ctx: Context) -> None:
    await ctx.modes.round()
    assert ctx.trainer.left == {"asleep": LEASE, "idle": LEASE, "busy": LEASE, "steady": None, "never": None}
    assert [name for name, allowed in ctx.trainer.allowed.items() if not allowed] == ["never"]


async def test_a_window_is_told_anew_before_it_runs_out_and_for_no_longer_than_it_lasts(ctx: Context) -> None:
    modes = ctx.modes
    await modes.round()
    ctx.trainer.left |= {"asleep": LEASE * 0.6, "idle": LEASE * 0.4}
    assert await modes.round() == 1
    assert ctx.trainer.left == {"asleep": LEASE * 0.6, "idle": LEASE, "busy": LEASE, "steady": None, "never": None}
    ctx.now = at("2026-11-22T12:30:10")
    await modes.round()
    assert (ctx.trainer.left["asleep"], ctx.trainer.left["busy"]) == (LEASE * 0.6, 10.0)
    ctx.now = at("2026-11-22T12:30:20")
    await modes.round()
    assert (ctx.trainer.allowed["busy"], ctx.trainer.allowed["asleep"]) == (False, True)


async def test_a_window_that_ran_out_in_the_trainer_is_opened_again(ctx: Context) -> None:
    modes = ctx.modes
    await modes.round()
    ctx.trainer.allowed["idle"], ctx.trainer.left["idle"] = False, None
    assert await modes.round() == 1
    assert (ctx.trainer.allowed["idle"], ctx.trainer.left["idle"]) == (True, LEASE)


async def test_a_mode_that_changes_changes_how_long_it_holds(ctx: Context) -> None:
    modes = ctx.modes
    await modes.round()
    with ctx.engine.begin() as c:
        set_mode(c, "idle", Mode.RL)
        set_mode(c, "steady", Mode.AUTO)
        set_settings(c, "steady", {"windows": {"idle_after": 60}})
        remove_agent(c, "busy")
    await modes.round()
    assert ctx.trainer.left == {"asleep": LEASE, "idle": None, "busy": None, "steady": LEASE, "never": None}
    assert not ctx.trainer.allowed["busy"]


@pytest.mark.parametrize(
    ("hours", "now", "end"),
    [
        ("23:00-07:00", "2026-11-22T23:30", "2026-11-23T07:00"),
        ("23:00-07:00", "2026-11-23T06:59:59", "2026-11-23T07:00"),
        ("22:00-00:00", "2026-11-22T23:00", "2026-11-23T00:00"),
        ("23:00-07:00", "2026-10-24T23:30", "2026-10-25T07:00"),  # the night has an hour more
    ],
)
def test_sleep_hours_end_where_the_clock_on_the_wall_says(hours: str, now: str, end: str) -> None:
    settings = WindowSettings(hours=[hours], time_zone="Europe/Berlin")
    assert window_now(settings, at(now), Activity(None, None)).until == at(end)


def test_an_hour_that_comes_twice_ends_twice() -> None:
    settings = WindowSettings(hours=["01:00-02:30"], time_zone="Europe/Berlin")
    first = at("2026-10-25T02:10")
    for now in (first, first + 3600):
        assert window_now(settings, now, Activity(None, None)).until == now + 20 * 60
