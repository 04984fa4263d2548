"""One line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True)
class Finding:
    """What was looked at, what was seen, and what to do if that is not well."""

    level: Level
    about: str
    seen: str
    remedy: str = ""


def ok(about: str, seen: str) -> Finding:
    return Finding(Level.OK, about, seen)


def warning(about: str, seen: str, remedy: str) -> Finding:
    return Finding(Level.WARNING, about, seen, remedy)


def failure(about: str, seen: str, remedy: str) -> Finding:
    return Finding(Level.FAILURE, about, seen, remedy)
