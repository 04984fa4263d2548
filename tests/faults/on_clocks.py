"""Faults of clocks: those of all processes, or of one alone, are set off and back."""

from __future__ import annotations

import asyncio

from tests.faults import points
from tests.faults.fault_list import fault, until
from tests.faults.siege import Siege, Work

HOUR = 3600.0
ROLES = ("gateway", "worker", "trainer")


def _clocks(off: float, roles: tuple[str, ...]) -> Work:
    async def work(siege: Siege) -> int:
        folder = siege.stage.folder
        for role in roles:
            points.set_clock(folder, role, off)
        await asyncio.sleep(6.0)
        await until(lambda: all(points.clock_of(folder, role) == off for role in roles))
        gone_by = sum(points.clock_of(folder, role) == off for role in roles)
        for role in roles:
            points.set_clock(folder, role, 0.0)
        await asyncio.sleep(1.0)
        return gone_by if gone_by == len(roles) else 0

    return work


fault("all clocks an hour ahead, and back")(_clocks(HOUR, ROLES))
fault("all clocks an hour behind, and back")(_clocks(-HOUR, ROLES))
fault("the worker's clock an hour ahead, and back")(_clocks(HOUR, ("worker",)))
fault("the trainer's clock a day behind, and back")(_clocks(-24 * HOUR, ("trainer",)))
