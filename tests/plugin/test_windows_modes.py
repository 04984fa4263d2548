"""Modes and windows, on a clock that the test sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from metaclaw_hooks.types import Mode

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings import WindowSettings
from metaclaw_plugin.store.agents import add_agent, list_agents, remove_agent, set_global_mode, set_mode, set_settings
from metaclaw_plugin.store.facts import get_fact
from metaclaw_plugin.store.last_requests import ANYONE, note_requests
from metaclaw_plugin.worker.modes import WINDOWS_FACT
from metaclaw_plugin.worker.windows import Activity, Window, check_windows, window_now
from tests.windows_cases import Context, at, make_context


@pytest.mark.parametrize(
    ("time", "is_open"),
    [
        ("2026-11-22T22:59:59", False),
        ("2026-11-22T23:00:00", True),
        ("2026-11-23T00:00:00", True),
        ("2026-11-23T06:59:59", True),
        ("2026-11-23T07:00:00", False),
        ("2026-07-01T23:30:00", True),  # summer time: another distance to UTC
        ("2026-07-01T22:30:00", False),
    ],
)
def test_sleep_hours_reach_across_midnight_in_their_own_time_zone(time: str, is_open: bool) -> None:
    settings = WindowSettings(hours=["23:00-07:00"], time_zone="Europe/Berlin")
    assert window_now(settings, at(time), Activity(None, None)).open is is_open


def test_any_of_several_windows_opens() -> None:
    settings = WindowSettings(hours=["12:00-13:00", "23:00-07:00"], time_zone="Europe/Berlin", idle_after=600)
    noon, evening = at("2026-11-22T12:30:00"), at("2026-11-22T20:00:00")
    assert window_now(settings, noon, Activity(noon, noon)).reason == "sleep hours 12:00-13:00"
    assert not window_now(settings, evening, Activity(evening - 599, evening)).open
    assert window_now(settings, evening, Activity(evening - 600, evening)).reason == "idle for 600 s"


def test_idle_may_mean_all_traffic() -> None:
    settings = WindowSettings(idle_after=60, idle_scope="all")
    assert not window_now(settings, 1000.0, Activity(None, 950.0)).open
    assert window_now(settings, 1000.0, Activity(999.0, 900.0)).open


@pytest.mark.parametrize("hours", ["7-9", "24:00-07:00", "23:00", "23:00-23:00", "23:00 - 07:00"])
def test_hours_that_are_none_are_refused_with_an_example(hours: str) -> None:
    with pytest.raises(ConfigError, match=r"HH:MM-HH:MM|the same"):
        window_now(WindowSettings(hours=[hours], time_zone="UTC"), 0.0, Activity(None, None))


def test_a_zone_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="Europe/Atlantis"):
        window_now(WindowSettings(hours=["01:00-02:00"], time_zone="Europe/Atlantis"), 0.0, Activity(None, None))


@pytest.mark.parametrize(
    ("calendar", "complaint"),
    [
        ("http://x:abc/secret.ics", "no URL: Invalid port"),
        ("https:///secret.ics", "names no host"),
        ("webcal://c.example/secret.ics", "write https://"),
        ("~no-such-user-here.ics", "name of no user"),
        ("secret.ics", "write a whole path"),
        ("c.example/secret.ics", "write a whole path"),
        ("/c\x00.ics", "write a whole path"),
        ("", "write a whole path"),
    ],
)
def test_a_calendar_that_is_written_as_none_is_refused_in_words(calendar: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        check_windows(WindowSettings(calendar=calendar))
    assert "secret" not in str(caught.value)


def test_addresses_and_whole_paths_are_calendars() -> None:
    for calendar in ("/c.ics", "~/c.ics", "https://c.example/a%20b.ics?x=1", "HTTP://c.example:8080/c.ics"):
        check_windows(WindowSettings(calendar=calendar))


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    return make_context(tmp_path)


async def test_the_trainer_is_told_what_differs_and_nothing_else(ctx: Context) -> None:
    modes = ctx.modes
    with ctx.engine.begin() as c:
        add_agent(c, "ada")
        add_agent(c, "bob", Mode.SKILLS_ONLY)
    assert await modes.round() == 2
    assert ctx.trainer.allowed == {"ada": True, "bob": False}
    assert await modes.round() == 0
    with ctx.engine.begin() as c:
        set_mode(c, "ada", Mode.OFF)
        set_mode(c, "bob", None)
    await modes.round()
    assert ctx.trainer.allowed == {"ada": False, "bob": True}


async def test_the_global_mode_is_changed_while_running_and_an_agents_own_stands_before_it(ctx: Context) -> None:
    modes = ctx.modes
    with ctx.engine.begin() as c:
        add_agent(c, "ada")
        add_agent(c, "bob", Mode.RL)
        set_global_mode(c, Mode.SKILLS_ONLY)
    await modes.round()
    assert ctx.trainer.allowed == {"ada": False, "bob": True}
    with ctx.engine.begin() as c:
        assert [record.agent(Mode.RL).mode for record in list_agents(c)] == [Mode.SKILLS_ONLY, Mode.RL]
        set_global_mode(c, None)  # the configured one, rl
    await modes.round()
    assert ctx.trainer.allowed == {"ada": True, "bob": True}


async def test_a_trainer_that_forgot_is_told_again_and_a_removed_agent_is_stopped(ctx: Context) -> None:
    modes = ctx.modes
    with ctx.engine.begin() as c:
        add_agent(c, "ada")
    await modes.round()
    ctx.trainer.allowed.clear()
    await modes.round()
    assert ctx.trainer.allowed == {"ada": True}
    with ctx.engine.begin() as c:
        remove_agent(c, "ada")
    await modes.round()
    assert ctx.trainer.allowed == {"ada": False}


async def test_an_agents_own_windows_stand_before_the_global_ones_and_bad_ones_keep_it_held(ctx: Context) -> None:
    with ctx.engine.begin() as c:
        for name in ("ada", "bob", "eve"):
            add_agent(c, name, Mode.AUTO)
        set_settings(c, "bob", {"windows": {"hours": ["12:00-13:00"], "time_zone": "Europe/Berlin"}})
        set_settings(c, "eve", {"windows": {"hour": ["12:00-13:00"]}})
    ctx.now = at("2026-11-22T12:30:00")
    modes = ctx.modes
    await modes.round()
    assert ctx.trainer.allowed == {"ada": False, "bob": True, "eve": False}
    with ctx.engine.connect() as c:
        shown = get_fact(c, WINDOWS_FACT)
    assert "no window is configured" in shown["ada"]["reason"]
    assert "hour" in shown["eve"]["reason"]


async def test_a_hook_opens_a_window_and_a_hook_that_wants_it_shut_goes_first(ctx: Context) -> None:
    with ctx.engine.begin() as c:
        add_agent(c, "ada", Mode.AUTO)
        add_agent(c, "bob", Mode.SKILLS_ONLY)
    modes = ctx.modes
    ctx.plugins.opinions = [("power", True)]
    assert (await modes.permissions())["ada"] == Window(True, "opened by power")
    ctx.plugins.opinions = [("power", True), ("guests", False)]
    assert (await modes.permissions())["ada"] == Window(False, "kept shut by guests")
    assert not (await modes.permissions())["bob"].open


async def test_a_day_in_which_auto_trains_inside_its_windows_alone(ctx: Context, tmp_path: Path) -> None:
    """24 hours in steps of five minutes: sleep hours across midnight, a recurring meeting, a single one, idleness."""
    calendar = tmp_path / "work.ics"
    calendar.write_text(WORK, encoding="utf-8")
    windows = {"hours": ["23:00-06:30"], "time_zone": "Europe/Berlin", "calendar": str(calendar), "idle_after": 7200}
    with ctx.engine.begin() as c:
        add_agent(c, "ada", Mode.AUTO)
        set_settings(c, "ada", {"windows": windows})
    modes, day = ctx.modes, at("2026-11-23T00:00:00")  # a Monday
    open_at: list[int] = []
    for minute in range(0, 24 * 60, 5):
        ctx.now = day + minute * 60
        if 7 * 60 <= minute < 20 * 60:  # someone talks to the agent all day long
            with ctx.engine.begin() as c:
                note_requests(c, {"ada": ctx.now, ANYONE: ctx.now})
        await modes.round()
        if ctx.trainer.allowed["ada"]:
            open_at.append(minute)
    expected = [m for m in range(0, 24 * 60, 5) if _is_window(m)]
    assert open_at == expected
    changes = [m for m in expected if m - 5 not in expected] + [m for m in expected if m + 5 not in expected]
    assert ctx.trainer.calls == len(changes) - 1  # told at each change alone; the last window outlasts the day


def _is_window(minute: int) -> bool:
    sleeping = minute < 6 * 60 + 30 or minute >= 23 * 60
    meeting = 10 * 60 <= minute < 11 * 60 or 14 * 60 <= minute < 14 * 60 + 45
    idle = minute < 7 * 60 or minute >= 19 * 60 + 55 + 120  # talk from 07:00 to 19:55
    return sleeping or meeting or idle


WORK = """BEGIN:VCALENDAR
VERSION:2.0
PRODID:-//test//EN
BEGIN:VEVENT
UID:standup
DTSTART;TZID=Europe/Berlin:20261102T100000
DTEND;TZID=Europe/Berlin:20261102T110000
RRULE:FREQ=WEEKLY;BYDAY=MO
EXDATE;TZID=Europe/Berlin:20261130T100000
END:VEVENT
BEGIN:VEVENT
UID:once
DTSTART:20261123T130000Z
DURATION:PT45M
END:VEVENT
BEGIN:VEVENT
UID:free
DTSTART:20261123T080000Z
DTEND:20261123T170000Z
TRANSP:TRANSPARENT
END:VEVENT
BEGIN:VEVENT
UID:cancelled
DTSTART:20261123T080000Z
DTEND:20261123T170000Z
STATUS:CANCELLED
END:VEVENT
END:VCALENDAR
"""
