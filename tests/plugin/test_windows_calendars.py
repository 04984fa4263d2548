"""Calendars that open windows, good ones and bad ones."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

import httpx
import pytest

from metaclaw_plugin.errors import CalendarError
from metaclaw_plugin.worker import calendar_events
from metaclaw_plugin.worker import calendars as module
from metaclaw_plugin.worker.calendar_events import busy_times
from metaclaw_plugin.worker.calendars import HORIZON, MAX_BYTES, REFRESH, Calendars

BERLIN = ZoneInfo("Europe/Berlin")
DAY = 86400.0


def event(*lines: str) -> str:
    body = "\n".join(("UID:e", *lines))
    return f"BEGIN:VCALENDAR\nVERSION:2.0\nPRODID:-//test//EN\nBEGIN:VEVENT\n{body}\nEND:VEVENT\nEND:VCALENDAR\n"


def utc(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def test_bare_times_and_whole_days_are_those_of_the_owners_zone() -> None:
    noon = event("DTSTART:20261123T120000", "DTEND:20261123T130000").encode()
    assert busy_times(noon, BERLIN, utc("2026-11-23"), utc("2026-11-24")) == [
        (utc("2026-11-23T11:00"), utc("2026-11-23T12:00"))
    ]
    day = event("DTSTART;VALUE=DATE:20261123").encode()
    assert busy_times(day, BERLIN, utc("2026-11-23"), utc("2026-11-23T12:00")) == [
        (utc("2026-11-22T23:00"), utc("2026-11-23T23:00"))
    ]


def test_a_recurring_event_keeps_its_local_hour_over_the_change_of_the_clocks() -> None:
    text = event(
        "DTSTART;TZID=Europe/Berlin:20261020T090000",
        "DURATION:PT1H",
        "RRULE:FREQ=DAILY",
        "EXDATE;TZID=Europe/Berlin:20261027T090000",
    ).encode()
    assert busy_times(text, BERLIN, utc("2026-10-24"), utc("2026-10-28")) == [
        (utc("2026-10-24T07:00"), utc("2026-10-24T08:00")),
        (utc("2026-10-25T08:00"), utc("2026-10-25T09:00")),
        (utc("2026-10-26T08:00"), utc("2026-10-26T09:00")),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "this is no calendar",
        "<html><body>Please sign in</body></html>",
        "",
        "BEGIN:VCALENDAR\nBEGIN:VEVENT\nUID:e\n",
        event("DTSTART:yesterday"),
        event("DTSTART:99991231T230000Z", "DURATION:P2D"),  # OverflowError
        event("DTSTART:00010101T000000", "DTEND:99991231T000000"),
        event("DTSTART:20261123T120000Z", "DTEND:20261123T130000Z", "RRULE:FREQ=SOMETIMES"),
    ],
)
async def test_what_is_no_calendar_opens_no_window_and_says_so(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.ics"
    file.write_text(text, encoding="utf-8")
    calendars = Calendars(httpx.AsyncClient(verify=False))
    for _ in range(2):
        with pytest.raises(CalendarError, match=r"no valid iCalendar text"):
            await calendars.busy_until(str(file), BERLIN, utc("2026-11-23T12:30"))


async def test_a_file_that_changes_is_read_again_and_one_that_is_gone_goes_on_as_it_was(tmp_path: Path) -> None:
    file, now = tmp_path / "c.ics", utc("2026-11-23T12:30")
    calendars = Calendars(httpx.AsyncClient(verify=False))
    with pytest.raises(CalendarError, match="cannot be read: No such file"):
        await calendars.busy_until(str(file), BERLIN, now)
    file.write_text(event("DTSTART:20261123T120000Z", "DTEND:20261123T130000Z"), encoding="utf-8")
    assert await calendars.busy_until(str(file), BERLIN, now)
    file.write_text(event("DTSTART:20261124T120000Z", "DTEND:20261124T130000Z", "SUMMARY:moved"), encoding="utf-8")
    assert not await calendars.busy_until(str(file), BERLIN, now)
    file.unlink()
    assert await calendars.busy_until(str(file), BERLIN, now + DAY)


async def test_a_url_is_fetched_seldom_and_its_path_is_never_told() -> None:
    fetched: list[int] = []
    status = [200]

    def serve(request: httpx.Request) -> httpx.Response:
        fetched.append(1)
        return httpx.Response(status[0], text=event("DTSTART:20261123T120000Z", "DTEND:20261123T130000Z"))

    clock = [0.0]
    calendars = Calendars(httpx.AsyncClient(transport=httpx.MockTransport(serve)), monotonic=lambda: clock[0])
    url, now = "https://calendar.example/private-secret/basic.ics", utc("2026-11-23T12:30")
    for _ in range(5):
        assert await calendars.busy_until(url, BERLIN, now)
    assert len(fetched) == 1
    clock[0], status[0] = REFRESH + 1, 500
    assert await calendars.busy_until(url, BERLIN, now)  # as it was last read
    assert len(fetched) == 2
    fresh = Calendars(httpx.AsyncClient(transport=httpx.MockTransport(serve)))
    with pytest.raises(CalendarError) as caught:
        await fresh.busy_until(url, BERLIN, now)
    assert "calendar.example" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_an_event_that_recurs_without_measure_is_given_up_and_its_process_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, now = tmp_path / "c.ics", utc("2026-11-23T12:30")
    monkeypatch.setattr(calendar_events, "TIME", 3.0)
    calendars = Calendars(httpx.AsyncClient(verify=False))
    file.write_text(event("DTSTART:19700101T000000Z", "DURATION:PT1S", "RRULE:FREQ=SECONDLY"), encoding="utf-8")
    with pytest.raises(CalendarError, match="longer than"):
        await calendars.busy_until(str(file), BERLIN, now)
    began = time.monotonic()
    with pytest.raises(CalendarError, match="longer than"):
        await calendars.busy_until(str(file), BERLIN, now + 60)
    assert time.monotonic() - began < 1.0  # told from memory


async def test_what_is_to_come_is_worked_out_ahead_so_that_no_event_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, now = tmp_path / "c.ics", utc("2026-11-23T12:30")
    file.write_text("any", encoding="utf-8")
    asked: list[float] = []

    async def slow(text: bytes, zone: tzinfo, start: float, end: float) -> list[tuple[float, float]]:
        asked.append(start)
        await asyncio.sleep(0.0 if len(asked) == 1 else 60.0)
        return [(now, now + DAY)]

    monkeypatch.setattr(module, "work_out", slow)
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    calendars = Calendars(httpx.AsyncClient(verify=False))
    for after in (0.0, HORIZON * 0.4, HORIZON * 0.6, HORIZON * 0.9):
        assert await calendars.busy_until(str(file), BERLIN, now + after) == now + DAY
    assert asked == [now, now + HORIZON * 0.6]
    with pytest.raises(CalendarError, match="has not been worked out yet"):
        await calendars.busy_until(str(file), BERLIN, now + HORIZON)


class Slow(httpx.AsyncByteStream):
    """A body that comes byte by byte, without end."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield b"B"
            await asyncio.sleep(0.02)


async def test_a_url_that_drips_is_waited_for_in_the_background_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[int] = []

    def serve(request: httpx.Request) -> httpx.Response:
        fetched.append(1)
        return httpx.Response(200, stream=Slow())

    monkeypatch.setattr(module, "PATIENCE", 0.1)
    monkeypatch.setattr(module, "FETCH_TIMEOUT", 1.0)
    calendars = Calendars(httpx.AsyncClient(transport=httpx.MockTransport(serve)))
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(CalendarError, match="has not been read yet"):
            await calendars.busy_until("https://c.example/a", BERLIN, 0.0)
    assert time.monotonic() - began < 0.9
    await asyncio.sleep(1.2)
    with pytest.raises(CalendarError, match=r"c\.example did not come whole within 1 s"):
        await calendars.busy_until("https://c.example/a", BERLIN, 0.0)
    assert len(fetched) == 1


async def test_a_file_that_hangs_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.ics")
    with pytest.raises(CalendarError, match="is no file"):
        await Calendars(httpx.AsyncClient(verify=False)).busy_until(str(tmp_path / "c.ics"), BERLIN, 0.0)


async def test_a_calendar_without_end_is_not_swallowed() -> None:
    flood = httpx.MockTransport(lambda request: httpx.Response(200, content=b"x" * (MAX_BYTES + 1)))
    with pytest.raises(CalendarError, match="larger than"):
        await Calendars(httpx.AsyncClient(transport=flood)).busy_until("https://c.example/a", BERLIN, 0.0)
