"""When the events of a calendar last, worked out in a process of its own.

A calendar is foreign text. One event that recurs every second since 1970 is hours of work in one call of a library, and
nothing but the end of a process ends that; so the work is done by a child that has a limit of time and of memory.
Recurring events, exceptions and time zones are icalendar's and recurring-ical-events' business.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from datetime import time as clock_time
from typing import Any
from zoneinfo import ZoneInfo

from metaclaw_plugin.errors import CalendarError

TIME = 60.0  # seconds that a calendar may take
MAX_MEMORY = 2**30  # bytes
MAX_EVENTS = 10_000  # in the days that are looked at
ANY_ZONE = 86400.0  # seconds: no zone is farther from UTC


async def work_out(text: bytes, zone: tzinfo, start: float, end: float) -> list[tuple[float, float]]:
    """``busy_times`` in a child process, which is ended when it takes too long.

    Raises:
        CalendarError: if the text is no calendar, or one that takes too long.
    """
    command = (sys.executable, "-P", "-m", __name__, _word(zone), repr(start), repr(end))
    pipe = asyncio.subprocess.PIPE
    try:
        child = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError as error:
        raise CalendarError(f"no process can be started to read it: {error.strerror}") from error
    try:
        output, _ = await asyncio.wait_for(child.communicate(text), TIME)
    except TimeoutError as error:
        raise CalendarError(_TOO_LONG) from error
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    if child.returncode == -signal.SIGXCPU:
        raise CalendarError(_TOO_LONG)
    if child.returncode != 0:
        raise CalendarError(f"the process that reads it ended with {child.returncode}; is icalendar installed?")
    answer = json.loads(output)
    if "error" in answer:
        raise CalendarError(answer["error"])
    return [(first, last) for first, last in answer["busy"]]


_TOO_LONG = (
    f"its events take longer than {TIME:g} s to work out; does one recur every second, or are there very many? "
    "Export a smaller calendar"
)


def busy_times(text: bytes, zone: tzinfo, start: float, end: float) -> list[tuple[float, float]]:
    """When events of the ICS text last that touch ``start`` to ``end`` (Unix seconds); free and cancelled ones do not.

    ``zone`` is that of times that name none, and of whole days.

    Raises:
        CalendarError: if the text is no calendar, an event of it makes no sense, or there are too many.
    """
    import icalendar
    import recurring_ical_events

    try:
        calendar = icalendar.Calendar.from_ical(text)
        # The library takes times without a zone for UTC: they are asked for wherever on earth they may be.
        span = (datetime.fromtimestamp(start - ANY_ZONE, UTC), datetime.fromtimestamp(end + ANY_ZONE, UTC))
        events: Iterable[Any] = recurring_ical_events.of(calendar).between(*span)
        busy = sorted(
            (_moment(event.start, zone), _moment(event.end, zone))
            for event in events
            if str(event.get("TRANSP", "OPAQUE")).upper() != "TRANSPARENT"
            and str(event.get("STATUS", "CONFIRMED")).upper() != "CANCELLED"
        )
    except MemoryError as error:
        raise CalendarError("its events take too much memory; export a smaller calendar") from error
    except Exception as error:
        raise CalendarError(
            f"it is no valid iCalendar text ({type(error).__name__}); does a calendar program open it?"
        ) from error
    touching = [(first, last) for first, last in busy if first < end and last > start]
    if len(touching) > MAX_EVENTS:
        raise CalendarError(f"it has more than {MAX_EVENTS} events in a few hours; export a smaller calendar")
    return touching


def _moment(value: date | datetime, zone: tzinfo) -> float:
    if not isinstance(value, datetime):
        value = datetime.combine(value, clock_time.min)
    return (value if value.tzinfo is not None else value.replace(tzinfo=zone)).timestamp()


def _word(zone: tzinfo) -> str:
    """The zone for a command line: its name, or how many seconds it is ahead of UTC."""
    if isinstance(zone, ZoneInfo):
        return zone.key
    ahead = zone.utcoffset(datetime.now(UTC).replace(tzinfo=None))
    return repr((ahead or timedelta()).total_seconds())


def _zone(word: str) -> tzinfo:
    try:
        return timezone(timedelta(seconds=float(word)))
    except ValueError:
        return ZoneInfo(word)


def _main(zone: str, start: str, end: str) -> None:
    """In the child: a calendar in, its busy times or what is wrong with it out, as JSON."""
    os.nice(10)
    resource.setrlimit(resource.RLIMIT_CPU, (int(TIME), int(TIME) + 1))  # should the worker die
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    try:
        answer: dict[str, Any] = {"busy": busy_times(sys.stdin.buffer.read(), _zone(zone), float(start), float(end))}
    except CalendarError as error:
        answer = {"error": str(error)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main(*sys.argv[1:])
