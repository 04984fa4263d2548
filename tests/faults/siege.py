"""Breaks a running system in every way there is, and sees to it that what each fault may cost is known."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.faults.accounts import LOSSES, Account, late_of
from tests.faults.auditor import at_rest, audit_all, audit_vllm, check_unread, stored_ids
from tests.faults.clients import Clients
from tests.faults.excuses import SAYING, Excuse, Failures, check_failures
from tests.faults.findings import Findings
from tests.faults.killer import Cost, Killer
from tests.faults.link import Link
from tests.faults.stage import AGENTS, Stage

BACK = 90.0  # seconds within which every agent must have an answer again
HURRY = 30.0  # seconds for the rest, when it was told to end
RETRIES = 45.0  # seconds for which a gateway goes on trying to store what it holds
Work = Callable[["Siege"], Awaitable[int]]  # breaks and mends something; how much it has touched


@dataclass
class Row:
    """What one fault did."""

    name: str
    cost: Cost
    began: float = 0.0  # monotonic
    seconds: float = 0.0  # that it lasted
    touched: int = 0  # connections, files, processes and so on that it has met; a fault that met none proves nothing
    requests: int = 0  # that were under way while it did
    failed: int = 0  # meanwhile, by whatever cause; known after the audit
    missing: int = 0  # answers without a stored trace
    counted: dict[str, int] = field(default_factory=dict)  # how much the gateway's counters rose
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

    async def fault(self, name: str, cost: Cost, work: Work, kills: bool = True) -> Row:
        """Let ``work`` break something and mend it again; then see that service is back, and what is missing."""
        async with self.killer.busy if not kills else contextlib.nullcontext():
            try:
                if not kills:
                    await self._all_up()
                elif cost == "records":
                    await self._spare_gateway()
                return await self._fault(Row(name, cost), work, kills)
            finally:
                self.killer.going_on = None

    async def _spare_gateway(self) -> None:
        """From now on neither gateway nor vLLM is killed; wait until those that were are gone and back."""
        async with self.killer.busy:
            self.killer.going_on = "records"
        await self.killer.gone()
        await self.stage.all_answer()

    async def _all_up(self) -> None:
        """Wait until every process runs and none has only begun to."""
        while not self.killer.is_due(("gateway-worker", signal.SIGKILL)):
            await asyncio.sleep(0.5)
        await self.stage.all_answer()
        await asyncio.sleep(3.0)

    async def _fault(self, row: Row, work: Work, kills: bool) -> Row:
        await self.back(time.monotonic())
        before = await self.stage.counted()
        folder, pids = self.stage.metrics_folder, self.stage.gateway_workers()
        late = {pid: late_of(folder, [pid]) for pid in pids}
        first, row.began = len(self.clients.asked), time.monotonic()
        self.killer.going_on = row.cost if kills else "no kills"
        row.touched = await work(self)
        if not row.touched:
            self.findings.blame("idle", f"{row.name}: it touched nothing, and so has shown nothing")
        await self._after(row, first, before, late)
        self.rows.append(row)
        return row

    async def _after(self, row: Row, first: int, before: dict[str, int], late: dict[int, int]) -> None:
        mended = time.monotonic()
        row.seconds = mended - row.began
        row.back = await self.back(mended)
        row.requests = sum(one.began <= mended for one in self.clients.asked[first:])
        costs = row.cost == "records"
        deadline = mended + row.back + (RETRIES if costs else 5.0)
        while True:
            account, missing = await self._account(row.name, first, before, late)
            # Of what a process that was killed may have held, it is known at the end alone who holds it no longer.
            final = account.balanced and not (missing and account.died_with) if costs else not account.missing
            if final or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.5)
        account.check(costs, self.findings)
        row.missing, row.counted = account.missing, dict(account.counted)
        self.forgiven |= missing
        self.unrecorded += account.bare

    async def _account(
        self, name: str, first: int, before: dict[str, int], late: dict[int, int]
    ) -> tuple[Account, set[str]]:
        """What was asked since and is not stored by now, against the gateway's counters; and the missing traces."""
        during = self.clients.asked[first:]
        whole = [one for one in during if one.whole]
        stored = await asyncio.to_thread(stored_ids, self.stage)
        missing = {one.trace for one in whole if one.trace and not stored[one.trace]}
        after = await self.stage.counted()
        killed = [pid for pid in late if pid in self.killer.ended_workers]
        account = Account(
            name,
            traces=len(missing),
            bare=sum(not one.trace for one in whole),
            failed=len(during) - len(whole),
            counted={loss: after.get(loss, 0) - before.get(loss, 0) for loss in LOSSES},
            died_with=sum(late_of(self.stage.metrics_folder, [pid]) - late[pid] for pid in killed),
        )
        return account, missing

    def excuse(self, why: str, began: float, allows: Mapping[str, str]) -> None:
        """Requests may have failed in the ways ``allows`` from ``began`` until now."""
        self.killer.excuses.append(Excuse(why, began - 0.05, time.monotonic() + SAYING, allows))

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
    async def link(self, name: str, mode: Any, **values: Any) -> AsyncIterator[Link]:
        """The link ``name`` does something else for as long as the block runs."""
        link = self.stage.links[name]
        for key, value in values.items():
            setattr(link, key, value)
        await link.set(mode)
        try:
            yield link
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

    async def audit(self) -> Failures:
        """Compare everything; which requests failed by what."""
        await self.killer.gone()
        bare = sum(one.whole and not one.trace for one in self.clients.asked)
        if bare > self.unrecorded:
            self.findings.blame("lost", f"{bare - self.unrecorded} answers went unrecorded while the store was well")
        traces = await asyncio.to_thread(audit_all, self.stage, self.clients.asked, self.forgiven, self.findings)
        await asyncio.to_thread(audit_vllm, self.stage, self.findings)
        failures = check_failures(self.clients.asked, self.killer.excuses, self.findings)
        check_unread(failures, traces, self.findings)
        for row in self.rows:
            end = row.began + row.seconds + row.back
            row.failed = sum(not one.whole and row.began <= one.ended <= end for one in self.clients.asked)
        return failures
