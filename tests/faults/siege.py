"""Breaks a running system in every way there is, and sees to it that what each fault may cost is known."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
import psutil

from tests.faults import points
from tests.faults.auditor import at_rest, audit_all, check_failures, stored_ids
from tests.faults.clients import Clients
from tests.faults.findings import Findings
from tests.faults.stage import AGENTS, Stage

BACK = 90.0  # seconds within which every agent must have an answer again
GROWN = 14.0  # seconds that a worker of the gateway takes to start, about
HURRY = 30.0  # seconds for the rest, when it was told to end
RETRIES = 45.0  # seconds for which a gateway goes on trying to store what it holds
LOSSES = ("traces_lost", "commits_late", "requests_unrecorded")
PASSED = 15.0  # seconds for which a point that a process is to die at may wait for one to pass
Cost = Literal["nothing", "requests", "records"]


@dataclass
class Row:
    """What one fault did."""

    name: str
    cost: Cost
    seconds: float = 0.0  # that it lasted
    requests: int = 0  # that were under way while it did
    failed: int = 0
    missing: int = 0  # answers without a stored trace
    counted: int = 0  # of those, as the gateway says
    back: float = 0.0  # seconds until every agent had an answer that was asked for after the fault


@dataclass
class Siege:
    """See the module."""

    stage: Stage
    clients: Clients
    chance: random.Random
    findings: Findings = field(default_factory=Findings)
    kills: Counter[str] = field(default_factory=Counter)
    at_points: Counter[str] = field(default_factory=Counter)
    rows: list[Row] = field(default_factory=list)
    excuses: list[tuple[float, float, str]] = field(default_factory=list)
    forgiven: set[str] = field(default_factory=set)  # traces that are not in the store, and were counted
    unrecorded: int = 0  # answers without a trace id, counted
    backs: list[float] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    # kills -----------------------------------------------------------------------------------------------------------

    async def kill(self, name: str, number: signal.Signals) -> None:
        """One signal for one process: worker, trainer, gateway-worker, gateway or vllm."""
        if name == "gateway":
            await self.restart_gateway(number)
        elif name == "vllm":
            await self.restart_vllm(number)
        elif name == "gateway-worker":
            pids = self.stage.gateway_workers()
            if not pids:
                return
            self._kill_one(self.chance.choice(pids), number, "gateway worker killed")
        elif pid := self.stage.pid(name):
            with contextlib.suppress(ProcessLookupError):  # it ended a moment ago and will be started again
                os.kill(pid, number)
        self.kills[f"{name} {number.name}"] += 1

    async def kill_at(self, point: str, number: signal.Signals) -> bool:
        """Let whoever passes ``point`` next get the signal; False if nobody did."""
        points.arm(self.stage.folder, point, number)
        deadline = time.monotonic() + PASSED
        while (done := points.fired(self.stage.folder, point)) is None:
            if time.monotonic() > deadline or self.ended.is_set():
                if points.disarm(self.stage.folder, point):
                    return False
                deadline += 1.0
            await asyncio.sleep(0.02)
        if point in points.GATEWAY_POINTS:
            self._excuse(done.at, 20.0 if number is signal.SIGTERM else 0.5, "gateway worker killed")
        role = "gateway-worker" if point in points.GATEWAY_POINTS else (
            "worker" if point in points.WORKER_POINTS else "trainer"
        )  # fmt: skip
        self.kills[f"{role} {number.name}"] += 1
        self.at_points[point] += 1
        return True

    def is_due(self, order: object) -> bool:
        """Whether a kill may be carried out now: a gateway's worker has to wait until both are up, or nobody talks."""
        if not isinstance(order, tuple) or order[0] not in ("gateway-worker", "gateway", *points.GATEWAY_POINTS):
            return True
        ages = []
        for pid in self.stage.gateway_workers():
            with contextlib.suppress(psutil.Error):
                ages.append(time.time() - psutil.Process(pid).create_time())
        return len(ages) == self.stage.settings.gateway.workers and min(ages) > GROWN

    def _kill_one(self, pid: int, number: signal.Signals, why: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            # Told to stop, uvicorn closes what it has accepted and not read yet, and ends what it has begun.
            self._excuse(time.monotonic(), 20.0 if number is signal.SIGTERM else 0.5, why)

    def _excuse(self, at: float, lasting: float, why: str) -> None:
        self.excuses.append((at - 0.05, at + lasting, why))

    async def restart_gateway(self, number: signal.Signals) -> None:
        """End the gateway with its workers, and start it as a supervisor would."""
        began = time.monotonic()
        process = self.stage.gateway
        if number is signal.SIGTERM:
            os.kill(process.pid, number)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(process.wait), 30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.wait)
        self.stage.start_gateway()
        await self.stage.answers(f"{self.stage.url}/health/liveliness")
        self.excuses.append((began - 0.05, time.monotonic(), "gateway restarted"))

    async def restart_vllm(self, number: signal.Signals) -> None:
        """End vLLM and start it again; it has forgotten every adapter then."""
        began = time.monotonic()
        process = self.stage.vllm
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        await asyncio.to_thread(process.wait)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine
        self.stage.start_vllm()
        await self.stage.answers(f"http://127.0.0.1:{self.stage.vllm_port}/health")
        self.excuses.append((began - 0.05, time.monotonic() + 0.5, "vllm down"))

    # faults ----------------------------------------------------------------------------------------------------------

    async def fault(self, name: str, cost: Cost, work: Callable[[Siege], Awaitable[None]]) -> Row:
        """Let ``work`` break something and mend it again; then see that service is back, and what is missing."""
        row = Row(name, cost)
        await self.back(time.monotonic())  # so that what fails from here on is this fault's doing
        before = await self.stage.counted()
        first, began = len(self.clients.asked), time.monotonic()
        await work(self)
        mended = time.monotonic()
        row.seconds = mended - began
        if cost == "requests":
            self.excuses.append((began - 0.05, mended + 1.0, name))
        row.back = await self.back(mended)
        during = [one for one in self.clients.asked[first:] if one.began <= mended]
        row.requests = len(during)
        row.failed = sum(one.failed for one in during)
        bare = [one for one in during if one.whole and not one.trace]
        missing = await self._missing([one.trace for one in during if one.whole and one.trace], cost == "records")
        row.missing = len(missing) + len(bare)
        if row.missing:
            after = await self.stage.counted()
            row.counted = sum(after.get(loss, 0) - before.get(loss, 0) for loss in LOSSES)
        if row.missing and (cost != "records" or row.missing > row.counted):
            self.findings.blame("lost", f"{name}: {row.missing} answers have no trace, {row.counted} are counted")
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
        bare = sum(one.whole and not one.trace for one in self.clients.asked)
        if bare > self.unrecorded:
            self.findings.blame("lost", f"{bare - self.unrecorded} answers went unrecorded while the store was well")
        await asyncio.to_thread(audit_all, self.stage, self.clients.asked, self.forgiven, self.findings)
        return check_failures(self.clients.asked, self.excuses, self.findings)
