"""Breaks a running system in every way there is, and sees to it that what each fault may cost is known."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.faults.auditor import REFUSED, at_rest, audit_all, check_failures, stored_ids
from tests.faults.clients import Clients
from tests.faults.findings import Findings
from tests.faults.killer import Cost, Killer
from tests.faults.stage import AGENTS, Stage

BACK = 90.0  # seconds within which every agent must have an answer again
HURRY = 30.0  # seconds for the rest, when it was told to end
RETRIES = 45.0  # seconds for which a gateway goes on trying to store what it holds
LOSSES = ("traces_lost", "commits_late", "requests_unrecorded")


@dataclass
class Row:
    """What one fault did."""

    name: str
    cost: Cost
    seconds: float = 0.0  # that it lasted
    requests: int = 0  # that were under way while it did
    failed: int = 0  # by this fault; known after the audit
    missing: int = 0  # answers without a stored trace
    counted: int = 0  # of those, as the gateway says
    back: float = 0.0  # seconds until every agent had an answer that was asked for after the fault


@dataclass
class Siege:
    """See the module."""

    killer: Killer
    findings: Findings = field(default_factory=Findings)
    rows: list[Row] = field(default_factory=list)
    forgiven: set[str] = field(default_factory=set)  # traces that are not in the store, and were counted
    unrecorded: int = 0  # answers without a trace id, counted
    backs: list[float] = field(default_factory=list)

    @property
    def stage(self) -> Stage:
        return self.killer.stage

    @property
    def clients(self) -> Clients:
        return self.killer.clients

    @property
    def ended(self) -> asyncio.Event:
        return self.killer.ended

    # faults ----------------------------------------------------------------------------------------------------------

    async def fault(self, name: str, cost: Cost, work: Callable[[Siege], Awaitable[None]], kills: bool = True) -> Row:
        """Let ``work`` break something and mend it again; then see that service is back, and what is missing."""
        async with self.killer.busy if not kills else contextlib.nullcontext():
            if not kills:
                await self._all_up()
            return await self._fault(Row(name, cost), work, kills)

    async def _all_up(self) -> None:
        """Wait until every process runs and none has only begun to."""
        while not self.killer.is_due(("gateway-worker", signal.SIGKILL)):
            await asyncio.sleep(0.5)
        await self.stage.all_answer()
        await asyncio.sleep(3.0)

    async def _fault(self, row: Row, work: Callable[[Siege], Awaitable[None]], kills: bool) -> Row:
        cost = row.cost
        await self.back(time.monotonic())
        before = await self.stage.counted()
        first, began = len(self.clients.asked), time.monotonic()
        self.killer.going_on = cost if kills else "no kills"
        try:
            await work(self)
            return await self._after(row, first, began, before)
        finally:
            self.killer.going_on = None

    async def _after(self, row: Row, first: int, began: float, before: dict[str, int]) -> Row:
        cost, mended = row.cost, time.monotonic()
        row.seconds = mended - began
        if cost == "requests":
            self.killer.excuses.append((began - 0.05, mended + 1.0, row.name))
        row.back = await self.back(mended)
        during = [one for one in self.clients.asked[first:] if one.began <= mended]
        row.requests = len(during)
        bare = [one for one in during if one.whole and not one.trace]
        missing = await self._missing([one.trace for one in during if one.whole and one.trace], cost == "records")
        row.missing = len(missing) + len(bare)
        if row.missing:
            after = await self.stage.counted()
            row.counted = sum(after.get(loss, 0) - before.get(loss, 0) for loss in LOSSES)
        if row.missing and (cost != "records" or row.missing > row.counted):
            self.findings.blame("lost", f"{row.name}: {row.missing} answers have no trace, {row.counted} are counted")
        self.forgiven |= missing
        self.unrecorded += len(bare)
        self.rows.append(row)
        return row

    async def _missing(self, traces: Sequence[str], patient: bool) -> set[str]:
        deadline = time.monotonic() + (RETRIES if patient else 5.0)
        while True:
            stored = await asyncio.to_thread(stored_ids, self.stage)
            missing = {name for name in traces if not stored[name]}
            if not missing or time.monotonic() > deadline:
                return missing
            await asyncio.sleep(0.5)

    async def back(self, since: float) -> float:
        """Wait until every agent has a whole answer to something that it asked after ``since``; the seconds."""
        while True:
            served: dict[str, float] = {}
            for one in reversed(self.clients.asked):
                if one.ended < since:
                    break
                if one.whole and one.began >= since:
                    served[one.agent] = one.ended
            if len(served) == len(AGENTS):
                took = max(served.values()) - since
                self.backs.append(took)
                return took
            if self.ended.is_set() and time.monotonic() > since + HURRY / 2:
                return HURRY / 2  # no verdict: it was not waited for
            if time.monotonic() > since + BACK:
                self.findings.blame("not back", f"{set(AGENTS) - set(served)} had no answer for {BACK:.0f} s")
                return BACK
            await asyncio.sleep(0.1)

    @asynccontextmanager
    async def link(self, name: str, mode: Any, **values: Any) -> AsyncIterator[None]:
        """The link ``name`` does something else for as long as the block runs."""
        link = self.stage.links[name]
        for key, value in values.items():
            setattr(link, key, value)
        await link.set(mode)
        try:
            yield
        finally:
            await link.set("pass")

    # the end ---------------------------------------------------------------------------------------------------------

    async def settle(self, timeout: float) -> None:
        """Hush the clients, and wait until all that was said is scored, forwarded, trained and served."""
        await self.clients.hush()
        began, hurried = time.monotonic(), None
        while goes_on := await asyncio.to_thread(at_rest, self.stage):
            if self.ended.is_set() and hurried is None:
                hurried = time.monotonic()
            if time.monotonic() > min(began + timeout, (hurried or began + timeout) + HURRY):
                self.findings.blame("not back", f"{time.monotonic() - began:.0f} s after the end: {goes_on}")
                return
            if "unscored" not in goes_on and "forwarded" not in goes_on:
                await self._train_rest()
            await asyncio.sleep(0.5)

    async def _train_rest(self) -> None:
        """Steps with what is queued, however little that is."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as http:
            for agent in AGENTS:
                url = f"http://127.0.0.1:{self.stage.trainer_port}/v1/agents/{agent}/train"
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with http.post(url):
                        pass

    async def audit(self) -> Counter[str]:
        """Compare everything; how many requests each kind of fault has failed."""
        await asyncio.gather(*self.killer.watching)
        bare = sum(one.whole and not one.trace for one in self.clients.asked)
        if bare > self.unrecorded:
            self.findings.blame("lost", f"{bare - self.unrecorded} answers went unrecorded while the store was well")
        await asyncio.to_thread(audit_all, self.stage, self.clients.asked, self.forgiven, self.findings)
        excused = check_failures(self.clients.asked, self.killer.excuses, self.findings)
        for row in self.rows:
            row.failed = excused[row.name] + excused[row.name + REFUSED]
        return excused
