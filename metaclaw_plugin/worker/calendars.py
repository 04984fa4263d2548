"""Calendars that open training windows: while an event lasts, its owner is busy and the agent may train.

An ICS file or URL is read again when it changed, or every quarter of an hour. Recurring events, exceptions and time
zones are icalendar's and recurring-ical-events' business. What an event says is never kept or logged.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, tzinfo
from datetime import time as clock_time
from pathlib import Path
from typing import Any

import httpx

from metaclaw_plugin.errors import CalendarError

logger = logging.getLogger(__name__)

REFRESH = 900.0  # seconds between two fetches of a URL
HORIZON = 6 * 3600.0  # seconds of events that are worked out at once
MAX_BYTES = 8 * 2**20
FETCH_TIMEOUT = 20.0  # seconds


@dataclass(slots=True)
class _Source:
    """One calendar as it was last read."""

    stamp: object = None  # of the file, or the time of the fetch
    text: bytes | None = None
    lost: str | None = None  # why it could not be read again
    broken: str | None = None  # why what was read is of no use
    busy: list[tuple[float, float]] = field(default_factory=list)  # Unix seconds
    known: tuple[float, float] = (0.0, 0.0)  # the time that ``busy`` covers


class Calendars:
    """Reads calendars and remembers them. ``monotonic`` is an argument so that tests need not wait."""

    def __init__(self, http: httpx.AsyncClient, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._http = http
        self._monotonic = monotonic
        self._sources: dict[tuple[str, str], _Source] = {}

    async def is_busy(self, source: str, zone: tzinfo, now: float) -> bool:
        """Whether an event of the calendar ``source`` (path or URL) lasts at ``now``; ``zone`` is that of bare times.

        A calendar that cannot be read again goes on as it was last read.

        Raises:
            CalendarError: if it could never be read, or is no calendar.
        """
        entry = self._sources.setdefault((source, str(zone)), _Source())
        fetch = self._fetch if source.startswith(("http://", "https://")) else self._read
        try:
            changed = await fetch(source, entry)
        except CalendarError as error:
            if entry.text is None:
                raise
            if entry.lost is None:
                logger.warning("%s; it goes on as it was last read", error)
            entry.lost, changed = str(error), False
        else:
            entry.lost = None if changed else entry.lost
        if changed or not entry.known[0] <= now < entry.known[1]:
            await self._work_out(source, entry, zone, now)
        if entry.broken is not None:
            raise CalendarError(entry.broken)
        return any(start <= now < end for start, end in entry.busy)

    async def _work_out(self, source: str, entry: _Source, zone: tzinfo, now: float) -> None:
        entry.known = (now, now + HORIZON)
        try:
            entry.busy = await asyncio.to_thread(busy_times, entry.text or b"", zone, now, now + HORIZON)
        except CalendarError as error:
            shown = _host(source) if source.startswith("http") else source
            entry.busy, entry.broken = [], f"the calendar {shown} cannot be used: {error}"
            logger.warning("%s", entry.broken)
        else:
            entry.broken = None

    async def _read(self, source: str, entry: _Source) -> bool:
        def read() -> tuple[object, bytes]:
            path = Path(source).expanduser()
            about = path.stat()
            stamp = (about.st_mtime_ns, about.st_size)
            if stamp == entry.stamp:
                return stamp, b""
            if about.st_size > MAX_BYTES:
                raise CalendarError(f"the calendar {source} is larger than {MAX_BYTES} bytes")
            return stamp, path.read_bytes()

        try:
            stamp, text = await asyncio.to_thread(read)
        except OSError as error:
            raise CalendarError(f"the calendar {source} cannot be read: {error.strerror}") from error
        if stamp == entry.stamp:
            return False
        entry.stamp, entry.text = stamp, text
        return True

    async def _fetch(self, source: str, entry: _Source) -> bool:
        now = self._monotonic()
        if isinstance(entry.stamp, float) and now < entry.stamp + REFRESH:
            return False
        entry.stamp = now  # a failure too is tried again only after a while
        body = b""
        try:
            async with self._http.stream("GET", source, timeout=FETCH_TIMEOUT, follow_redirects=True) as answer:
                answer.raise_for_status()
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_BYTES:
                        raise CalendarError(f"the calendar at {_host(source)} is larger than {MAX_BYTES} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise CalendarError(f"the calendar at {_host(source)} was not given: {type(error).__name__}") from error
        changed = body != entry.text
        entry.text = body
        return changed


def busy_times(text: bytes, zone: tzinfo, start: float, end: float) -> list[tuple[float, float]]:
    """When events of the ICS text last that touch ``start`` to ``end`` (Unix seconds); free and cancelled ones do not.

    Raises:
        CalendarError: if the text is no calendar, or an event of it makes no sense.
    """
    import icalendar
    import recurring_ical_events

    try:
        calendar = icalendar.Calendar.from_ical(text)
        span = (datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(end, UTC))
        events: Iterable[Any] = recurring_ical_events.of(calendar).between(*span)
        return sorted(
            (_moment(event.start, zone), _moment(event.end, zone))
            for event in events
            if str(event.get("TRANSP", "OPAQUE")).upper() != "TRANSPARENT"
            and str(event.get("STATUS", "CONFIRMED")).upper() != "CANCELLED"
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        # icalendar's own errors are ValueErrors; a broken rule can fail anywhere below.
        raise CalendarError(f"it is no valid iCalendar text ({type(error).__name__})") from error


def _moment(value: date | datetime, zone: tzinfo) -> float:
    if not isinstance(value, datetime):
        value = datetime.combine(value, clock_time.min)
    return (value if value.tzinfo is not None else value.replace(tzinfo=zone)).timestamp()


def _host(url: str) -> str:
    """Without the path, which often holds a secret."""
    return httpx.URL(url).host
