"""Faults that are made on purpose, one after the other: network, disk, database, files, clocks, absences.

Each says what it may cost: nothing at all; requests, because what answers them is away; or records, because the store
does not take them, and then every missing one must be counted. And each returns how much it has touched: connections
that were broken or held up, files that were away, processes that were gone or frozen. One that returns 0 has shown
nothing, and fails the run.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.killer import Cost
from tests.faults.siege import Work

MEET = 20.0  # seconds that a fault waits for something to touch, beyond those that it lasts


@dataclass(frozen=True)
class Fault:
    """One entry of the list."""

    name: str
    cost: Cost
    work: Work
    kills: bool = True  # processes may be killed meanwhile; not where one that starts would begin anew elsewhere


FAULTS: list[Fault] = []


def fault(name: str, cost: Cost = "nothing", *, kills: bool = True) -> Callable[[Work], Work]:
    """Put a function into the list."""

    def add(work: Work) -> Work:
        FAULTS.append(Fault(name, cost, work, kills))
        return work

    return add


async def until(met: Callable[[], object], timeout: float = MEET) -> bool:
    """Wait until ``met``; False if it never was."""
    deadline = time.monotonic() + timeout
    while not met():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True
