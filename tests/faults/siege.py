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
from tests.faults.auditor import REFUSED, at_rest, audit_all, check_failures, stored_ids
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
    failed: int = 0  # by this fault; known after the audit
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
    going_on: Cost | Literal["no kills"] | None = None  # what the fault that goes on may cost; or it wants no kills
    killing: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while an order to kill is carried out
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _gateway: asyncio.Lock = field(default_factory=asyncio.Lock)
    _vllm: asyncio.Lock = field(default_factory=asyncio.Lock)

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
                return  # all of them are starting
            pid, now = self.chance.choice(pids), time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            self._excuse(pid, now)
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
            self._excuse(done.pid, done.at)
        self.kills[f"{role_of(point)} {number.name}"] += 1
        self.at_points[point] += 1
        return True

    def is_due(self, order: tuple[str, signal.Signals]) -> bool:
        """Whether a kill may be carried out now.

        Who is to be killed must run. A worker of the gateway has to wait until both are up, or nobody would talk; and
        the gateway as a whole until a fault that costs records is over, since it forgets what it has counted.
        """
        role = role_of(order[0])
        if self.going_on == "no kills" or role == "vllm":
            return self.going_on != "no kills"
        if not role.startswith("gateway"):
            return bool(self.stage.pid(role))
        if self.going_on == "records" and role == "gateway":
            return False
        ages = []
        for pid in self.stage.gateway_workers():
            with contextlib.suppress(psutil.Error):
                ages.append(time.time() - psutil.Process(pid).create_time())
        return len(ages) == self.stage.settings.gateway.workers and min(ages) > GROWN

    def _excuse(self, pid: int, at: float) -> None:
        """What is in flight may fail from ``at`` until the worker is gone.

        Told to stop, it ends what it has begun; a connection that it has taken and not read from yet is closed.
        """

        async def watch() -> None:
            while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.05)

        async def excuse() -> None:
            with contextlib.suppress(psutil.Error):  # gone between two looks
                await watch()
            self.excuses.append((at - 0.05, time.monotonic() + 0.1, "gateway worker killed"))

        task = asyncio.create_task(excuse())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def restart_gateway(self, number: signal.Signals) -> None:
        """End the gateway with its workers, and start it as a supervisor would."""
        async with self._gateway:
            await self._restart_gateway(number)

    async def _restart_gateway(self, number: signal.Signals) -> None:
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
        async with self._vllm:
            await self._restart_vllm(number)

    async def _restart_vllm(self, number: signal.Signals) -> None:
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

    async def fault(self, name: str, cost: Cost, work: Callable[[Siege], Awaitable[None]], kills: bool = True) -> Row:
        """Let ``work`` break something and mend it again; then see that service is back, and what is missing."""
        async with self.killing if not kills else contextlib.nullcontext():
            if not kills:
                await self._all_up()
            return await self._fault(Row(name, cost), work, kills)

    async def _all_up(self) -> None:
        """Wait until every process runs and none has only begun to."""
        while not self.is_due(("gateway-worker", signal.SIGKILL)):
            await asyncio.sleep(0.5)
        await self.stage.all_answer()
        await asyncio.sleep(3.0)

    async def _fault(self, row: Row, work: Callable[[Siege], Awaitable[None]], kills: bool) -> Row:
        cost = row.cost
        await self.back(time.monotonic())
        before = await self.stage.counted()
        first, began = len(self.clients.asked), time.monotonic()
        self.going_on = cost if kills else "no kills"
        try:
            await work(self)
            return await self._after(row, first, began, before)
        finally:
            self.going_on = None

    async def _after(self, row: Row, first: int, began: float, before: dict[str, int]) -> Row:
        cost, mended = row.cost, time.monotonic()
        row.seconds = mended - began
        if cost == "requests":
            self.excuses.append((began - 0.05, mended + 1.0, row.name))
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
        await asyncio.gather(*self._tasks)
        bare = sum(one.whole and not one.trace for one in self.clients.asked)
        if bare > self.unrecorded:
            self.findings.blame("lost", f"{bare - self.unrecorded} answers went unrecorded while the store was well")
        await asyncio.to_thread(audit_all, self.stage, self.clients.asked, self.forgiven, self.findings)
        excused = check_failures(self.clients.asked, self.excuses, self.findings)
        for row in self.rows:
            row.failed = excused[row.name] + excused[row.name + REFUSED]
        return excused


def role_of(name: str) -> str:
    """Who is killed by an order that names a process, or a point."""
    if name not in points.POINTS:
        return name
    if name in points.GATEWAY_POINTS:
        return "gateway-worker"
    return "worker" if name in points.WORKER_POINTS else "trainer"
