"""Calendars whose times name no zone, read where the owner is: west and east of UTC, and as clocks change."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import httpx
import pytest

from metaclaw_plugin.worker.calendars import Calendars

LOS_ANGELES, TOKYO, BERLIN = ZoneInfo("America/Los_Angeles"), ZoneInfo("Asia/Tokyo"), ZoneInfo("Europe/Berlin")
EVENING = ("DTSTART:20260101T200000", "DTEND:20260101T210000")
MORNING = ("DTSTART:20260101T060000", "DTEND:20260101T070000")
NEW_YEAR = ("DTSTART;VALUE=DATE:20260101",)
NIGHTLY = ("DTSTART:20260301T033000", "DTEND:20260301T043000", "RRULE:FREQ=DAILY")
SPRING = ("DTSTART;VALUE=DATE:20260329",)  # 23 hours in Berlin


@pytest.mark.parametrize(
    ("zone", "lines", "at", "ends"),
    [
        (LOS_ANGELES, EVENING, "2026-01-01T19:59:59", None),
        (LOS_ANGELES, EVENING, "2026-01-01T20:30", "2026-01-01T21:00"),
        (LOS_ANGELES, NEW_YEAR, "2025-12-31T23:59:59", None),
        (LOS_ANGELES, NEW_YEAR, "2026-01-01T19:00", "2026-01-02T00:00"),
        (LOS_ANGELES, NEW_YEAR, "2026-01-02T00:00", None),
        (TOKYO, MORNING, "2026-01-01T05:59:59", None),
        (TOKYO, MORNING, "2026-01-01T06:30", "2026-01-01T07:00"),
        (TOKYO, MORNING, "2026-01-01T15:30", None),
        (TOKYO, NEW_YEAR, "2026-01-01T01:00", "2026-01-02T00:00"),
        (TOKYO, NEW_YEAR, "2026-01-02T01:00", None),
        (BERLIN, NIGHTLY, "2026-03-28T04:00", "2026-03-28T04:30"),
        (BERLIN, NIGHTLY, "2026-03-29T04:00", "2026-03-29T04:30"),  # the night in which 02:00 became 03:00
        (BERLIN, SPRING, "2026-03-29T23:30", "2026-03-30T00:00"),
        (BERLIN, SPRING, "2026-03-30T00:30", None),
    ],
)
async def test_times_without_a_zone_are_those_of_the_owner(
    zone: ZoneInfo, lines: tuple[str, ...], at: str, ends: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "c.ics"
    event = ("BEGIN:VCALENDAR", "VERSION:2.0", "BEGIN:VEVENT", "UID:e", *lines, "END:VEVENT", "END:VCALENDAR", "")
    file.write_text("\n".join(event), encoding="utf-8")
    now, end = _local(at, zone), None if ends is None else _local(ends, zone)
    async with httpx.AsyncClient(trust_env=False) as http:
        assert await Calendars(http).busy_until(str(file), zone, now) == end


def _local(text: str, zone: ZoneInfo) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()
