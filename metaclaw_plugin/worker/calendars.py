"""Calendars that open training windows: while an event lasts, its owner is busy and the agent may train.

An ICS file or URL is read again when it changed, or every quarter of an hour, beside the rounds that ask for it: one
that hangs, or is slow, keeps no round waiting for more than ``PATIENCE``. What an event says is never kept or logged.
"""

from __future__ import annotations

import asyncio
import logging
import stat
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import tzinfo
from pathlib import Path

import httpx

from metaclaw_plugin.errors import CalendarError
from metaclaw_plugin.worker.calendar_events import work_out
from metaclaw_plugin.worker.windows import parse_calendar

logger = logging.getLogger(__name__)

REFRESH = 900.0  # seconds between two fetches of a URL
HORIZON = 6 * 3600.0  # seconds of events that are worked out at once, and again when half of them have passed
MAX_BYTES = 8 * 2**20
FETCH_TIMEOUT = 30.0  # seconds, from the first byte sent to the last one received
PATIENCE = 5.0  # seconds that a round waits for a calendar to be read


@dataclass(slots=True)
class _Source:
    """One calendar as it was last read."""

    stamp: object = None  # of the file, or the time of the fetch
    text: bytes | None = None
    lost: str | None = None  # why it could not be read again
    broken: str | None = None  # why what was read is of no use
    busy: list[tuple[float, float]] = field(default_factory=list)  # Unix seconds
    known: tuple[float, float] = (0.0, 0.0)  # the time that ``busy`` covers
    reading: asyncio.Task[None] | None = None  # one at a time, however long it takes


class Calendars:
    """Reads calendars and remembers them. ``monotonic`` is an argument so that tests need not wait."""

    def __init__(self, http: httpx.AsyncClient, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._http = http
        self._monotonic = monotonic
        self._sources: dict[tuple[str, str], _Source] = {}

    async def busy_until(self, source: str, zone: tzinfo, now: float) -> float | None:
        """When the event ends that lasts at ``now``, the last of several; ``None``: none lasts.

        ``source`` is a path or a URL, ``zone`` that of times that name none. A calendar that cannot be read again goes
        on as it was last read.

        Raises:
            ConfigError: if ``source`` is neither.
            CalendarError: if it could never be read, or is no calendar.
        """
        where = parse_calendar(source)
        entry = self._sources.setdefault((source, str(zone)), _Source())
        if entry.reading is None or entry.reading.done():
            entry.reading = asyncio.create_task(self._refresh(where, entry, zone, now))
        await asyncio.wait({entry.reading}, timeout=PATIENCE)
        if entry.text is None:
            raise CalendarError(entry.lost or f"{_shown(where)} has not been read yet: it takes long to come")
        if not entry.known[0] <= now < entry.known[1]:
            raise CalendarError(f"{_shown(where)} has not been worked out yet: it takes long")
        if entry.broken is not None:
            raise CalendarError(entry.broken)
        return max((end for start, end in entry.busy if start <= now < end), default=None)

    async def _refresh(self, where: httpx.URL | Path, entry: _Source, zone: tzinfo, now: float) -> None:
        """Read it if it is due, and work out what is to come. Whatever goes wrong is told by ``entry``."""
        try:
            changed = await (self._fetch(where, entry) if isinstance(where, httpx.URL) else self._read(where, entry))
        except Exception as error:  # noqa: BLE001 - isolation boundary: files, servers and networks do what they like
            changed, why = False, _why(error, where)
            if entry.lost is None and entry.text is not None:
                logger.warning("%s; it goes on as it was last read", why)
            entry.lost = why
        if entry.text is None or (not changed and entry.known[0] <= now < entry.known[1] - HORIZON / 2):
            return
        try:
            entry.busy, entry.broken = await work_out(entry.text, zone, now, now + HORIZON), None
        except Exception as error:  # noqa: BLE001 - isolation boundary: it is foreign text, and libraries read it
            said = str(error) if isinstance(error, CalendarError) else f"{_place(error)}; please report this"
            entry.busy, entry.broken = [], f"{_shown(where)} cannot be used: {said}"
            logger.warning("%s", entry.broken)
        entry.known = (now, now + HORIZON)

    async def _read(self, path: Path, entry: _Source) -> bool:
        def read() -> tuple[object, bytes]:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):
                raise CalendarError(f"{_shown(path)} is no file; give the path of an ICS file")
            stamp = (about.st_mtime_ns, about.st_size)
            if stamp == entry.stamp:
                return stamp, b""
            with path.open("rb") as file:
                return stamp, file.read(MAX_BYTES + 1)

        stamp, text = await asyncio.to_thread(read)
        entry.lost = None
        if stamp == entry.stamp:
            return False
        if len(text) > MAX_BYTES:
            raise CalendarError(_too_large(path))
        entry.stamp, entry.text = stamp, text
        return True

    async def _fetch(self, url: httpx.URL, entry: _Source) -> bool:
        now = self._monotonic()
        if isinstance(entry.stamp, float) and now < entry.stamp + REFRESH:
            return False
        entry.stamp = now  # a failure too is tried again only after a while
        body = bytearray()
        async with (
            asyncio.timeout(FETCH_TIMEOUT),  # httpx's own begins anew with every byte
            self._http.stream("GET", url, timeout=FETCH_TIMEOUT, follow_redirects=True) as answer,
        ):
            answer.raise_for_status()
            async for chunk in answer.aiter_bytes():
                body += chunk
                if len(body) > MAX_BYTES:
                    raise CalendarError(_too_large(url))
        text = bytes(body)
        changed, entry.text, entry.lost = text != entry.text, text, None
        return changed


def _shown(where: httpx.URL | Path) -> str:
    """A URL without its path, which often holds a secret."""
    return f"the calendar at {where.host}" if isinstance(where, httpx.URL) else f"the calendar {where}"


def _too_large(where: httpx.URL | Path) -> str:
    return f"{_shown(where)} is larger than {MAX_BYTES} bytes; export a smaller one"


def _why(error: Exception, where: httpx.URL | Path) -> str:
    """What is to be told of a calendar that could not be read, and no more than that."""
    shown = _shown(where)
    match error:
        case CalendarError():
            return str(error)
        case TimeoutError() | httpx.TimeoutException():
            return f"{shown} did not come whole within {FETCH_TIMEOUT:g} s; it is asked for again in a while"
        case httpx.HTTPStatusError():
            return f"{shown} was refused with status {error.response.status_code}; does its address still hold?"
        case httpx.HTTPError():
            return f"{shown} was not given: {type(error).__name__}; it is asked for again in a while"
        case OSError():
            return f"{shown} cannot be read: {error.strerror}; check the path and who may read it"
        case _:
            return f"{shown} cannot be read: {_place(error)}"


def _place(error: Exception) -> str:
    return f"{type(error).__name__} in {traceback.extract_tb(error.__traceback__)[-1].name}"
