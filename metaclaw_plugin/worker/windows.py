"""When an agent in mode ``auto`` may train: sleep hours, idle time, a calendar.

A window is open when any of the configured ones is. Every function takes the time as an argument (Unix seconds), so a
whole day can be tried in a test. A window that closes ends training at the next step boundary: the trainer is told that
the agent may not train, finishes its step, and keeps what is queued. One that nobody is left to close ends by itself:
the trainer is told, again and again, for how long the agent may train.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from datetime import time as clock_time
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import httpx

from metaclaw_plugin.errors import ConfigError
from metaclaw_plugin.settings import WindowSettings

_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True, slots=True)
class Activity:
    """When requests came last (Unix seconds); None: never."""

    agent: float | None
    all: float | None


@dataclass(frozen=True, slots=True)
class Window:
    """Whether training may go on, and the reason in one line."""

    open: bool
    reason: str
    until: float | None = None  # Unix seconds at which it shuts; None: not known; infinite: it is no window at all


def window_now(settings: WindowSettings, now: float, activity: Activity) -> Window:
    """The state at ``now`` of the windows that need no calendar.

    Raises:
        ConfigError: if hours or time zone are not written as they must be.
    """
    if not settings.hours and settings.idle_after is None and settings.calendar is None:
        return Window(False, "mode auto, but no window is configured (metaclaw.windows)")
    zone = parse_zone(settings.time_zone)
    for hours in settings.hours:
        if in_hours(now, hours, zone):
            return Window(True, f"sleep hours {hours}", _end(now, hours, zone))
    if settings.idle_after is not None:
        last = activity.agent if settings.idle_scope == "agent" else activity.all
        if is_idle(now, last, settings.idle_after):
            return Window(True, f"idle for {settings.idle_after:g} s")
    return Window(False, "outside the windows of mode auto")


def check_windows(settings: WindowSettings) -> None:
    """Look at how hours, zone and calendar are written; whether the calendar is there is not asked.

    Raises:
        ConfigError: naming the first that is not written as it must be.
    """
    parse_zone(settings.time_zone)
    for hours in settings.hours:
        parse_hours(hours)
    if settings.calendar is not None:
        parse_calendar(settings.calendar)


def in_hours(now: float, hours: str, zone: tzinfo) -> bool:
    """Whether ``now`` is inside ``hours``, such as "23:00-07:00" local to ``zone``; the end itself is outside.

    Raises:
        ConfigError: if ``hours`` is not of that form.
    """
    start, end = parse_hours(hours)
    local = datetime.fromtimestamp(now, zone)
    minute = local.hour * 60 + local.minute
    return start <= minute < end if start < end else minute >= start or minute < end


def _end(now: float, hours: str, zone: tzinfo) -> float:
    """When ``hours``, in which ``now`` is, end."""
    _, end = parse_hours(hours)
    local = datetime.fromtimestamp(now, zone)
    day = local.date() if local.hour * 60 + local.minute < end else local.date() + timedelta(days=1)
    return datetime.combine(day, clock_time(end // 60, end % 60, fold=local.fold), zone).timestamp()


def parse_hours(hours: str) -> tuple[int, int]:
    """``"23:00-07:00"`` -> minutes after midnight of start and end.

    Raises:
        ConfigError: if it is not of that form, or start and end are the same.
    """
    match = _HOURS.fullmatch(hours)
    if match is None:
        raise ConfigError(f"sleep hours {hours!r}: write them as HH:MM-HH:MM, such as 23:00-07:00")
    first, second, third, fourth = map(int, match.groups())
    if (first, second) == (third, fourth):
        raise ConfigError(f"sleep hours {hours!r}: start and end are the same; for all day use mode rl")
    return first * 60 + second, third * 60 + fourth


def parse_zone(name: str | None) -> tzinfo:
    """An IANA time zone such as ``Europe/Berlin``; None: this machine's own.

    Raises:
        ConfigError: if there is no such zone.
    """
    if name is None:
        return datetime.now(UTC).astimezone().tzinfo or UTC
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise ConfigError(f"time zone {name!r} is not known; use a name such as Europe/Berlin or UTC") from error


def parse_calendar(source: str) -> httpx.URL | Path:
    """Where a calendar is: an address with http:// or https://, or the whole path of an ICS file.

    Raises:
        ConfigError: if it is written as neither; it never says the address, which may hold a secret.
    """
    scheme, is_address, _ = source.partition("://")
    if is_address:
        if scheme.lower() not in ("http", "https"):
            raise ConfigError(f"calendar: {scheme[:20]}:// cannot be fetched; write https:// (for webcal:// as well)")
        try:
            url = httpx.URL(source)
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"calendar: the address is no URL: {error}") from error
        if not url.host:
            raise ConfigError("calendar: the address names no host; write it as https://HOST/PATH")
        return url
    try:
        path = Path(source).expanduser()
    except RuntimeError as error:
        raise ConfigError("calendar: ~ is followed by the name of no user; a file of your own is ~/NAME.ics") from error
    if not path.is_absolute() or "\x00" in source:
        raise ConfigError("calendar: write a whole path, such as ~/work.ics, or an address with https://")
    return path


def is_idle(now: float, last_activity: float | None, idle_after: float) -> bool:
    """Whether nothing was asked for ``idle_after`` seconds; an agent that was never asked anything is idle."""
    return last_activity is None or now - last_activity >= idle_after
