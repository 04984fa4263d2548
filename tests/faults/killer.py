"""Ends processes of a running system at random moments or at named points, and starts again what nobody else would."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import psutil

from tests.faults import points
from tests.faults.accounts import has_answered
from tests.faults.clients import Clients
from tests.faults.excuses import KILLED, SAYING, SLACK, STARTING, STOPPED, UPSTREAM_AWAY, Excuse
from tests.faults.stage import Stage

HEARD = 30  # answers that vLLM gives before it is killed again
PASSED = 15.0  # seconds for which a point that a process is to die at may wait for one to pass
Cost = Literal["nothing", "requests", "records"]


@dataclass
class Killer:
    """See the module."""

    stage: Stage
    clients: Clients
    chance: random.Random
    ended: asyncio.Event
    kills: Counter[str] = field(default_factory=Counter)
    at_points: Counter[str] = field(default_factory=Counter)
    excuses: list[Excuse] = field(default_factory=list)
    ended_workers: list[int] = field(default_factory=list)  # of the gateway, by SIGKILL
    going_on: Cost | Literal["no kills"] | None = None  # what the fault that goes on may cost; or it wants no kills
    busy: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while an order is carried out
    watching: set[asyncio.Task[None]] = field(default_factory=set)  # until those who were killed are gone
    _gateway_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _vllm_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _vllm_up: float = 0.0  # monotonic

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
            self._end_gateway_worker(pid, now, number)
        elif pid := self.stage.pid(name):
            with contextlib.suppress(ProcessLookupError):  # it ended a moment ago and will be started again
                os.kill(pid, number)
        self.kills[f"{name} {number.name}"] += 1

    async def kill_at(self, point: str, number: signal.Signals) -> bool:
        """Let whoever passes ``point`` next get the signal; False if nobody did."""
        stands = point in points.GATEWAY_POINTS  # until its connections are counted
        points.arm(self.stage.folder, point, signal.SIGSTOP if stands else number)
        deadline = time.monotonic() + PASSED
        while (done := points.fired(self.stage.folder, point)) is None:
            if time.monotonic() > deadline or self.ended.is_set():
                if points.disarm(self.stage.folder, point):
                    return False
                deadline += 1.0
            await asyncio.sleep(0.02)
        if stands:
            self._end_gateway_worker(done.pid, done.at, number)
        self.kills[f"{role_of(point)} {number.name}"] += 1
        self.at_points[point] += 1
        return True

    def is_due(self, order: tuple[str, signal.Signals]) -> bool:
        """Whether a kill may be carried out now.

        Who is to be killed must run, and vLLM have answered a while. Of the gateway, both workers must have answered
        since they started, or nobody would. While a fault that costs records goes on, neither gateway nor vLLM is
        killed: what is missing is compared with what was counted, one by one, and a request that fails, or a process
        that takes along what it held, would blur that.
        """
        role = role_of(order[0])
        if self.going_on == "no kills" or (self.going_on == "records" and role not in ("worker", "trainer")):
            return False
        if role == "vllm":
            return self._heard() >= HEARD
        if not role.startswith("gateway"):
            return bool(self.stage.pid(role))
        if self.watching:
            return False  # one that was told to stop is still at it
        pids = self.stage.gateway_workers()
        both = len(pids) == self.stage.settings.gateway.workers
        return both and all(has_answered(self.stage.metrics_folder, pid) for pid in pids)

    def _end_gateway_worker(self, pid: int, at: float, number: signal.Signals) -> None:
        """Send it the signal. What it had in flight may fail from ``at`` until it is gone.

        Killed, it can fail no more requests than it held connections. Told to stop, it ends what it has begun; a
        connection that it has taken and not read from yet is closed, which happens to a client once at most, since it
        takes no more.
        """
        held = points.end_frozen(pid, number, self.stage.settings.gateway.port)
        killed = number is signal.SIGKILL
        if killed:
            self.ended_workers.append(pid)

        async def watch() -> None:
            while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                await asyncio.sleep(0.05)

        async def excuse() -> None:
            with contextlib.suppress(psutil.Error):  # gone between two looks
                await watch()
            why = "gateway worker killed" if killed else "gateway worker told to stop"
            allows, most = (KILLED, held) if killed else (STOPPED, self.clients.count)
            self.excuses.append(Excuse(why, at - 0.05, time.monotonic() + SLACK, allows, most))

        task = asyncio.create_task(excuse())
        self.watching.add(task)
        task.add_done_callback(self.watching.discard)

    async def gone(self) -> None:
        """Wait until the workers of the gateway that were killed, or told to stop, are gone."""
        await asyncio.gather(*self.watching)

    def _heard(self) -> int:
        """Answers that were asked for and received whole since vLLM came up."""
        heard = 0
        for one in reversed(self.clients.asked):
            if one.ended < self._vllm_up or heard == HEARD:
                break
            heard += one.whole and one.began > self._vllm_up
        return heard

    async def restart_gateway(self, number: signal.Signals) -> None:
        """End the gateway with its workers, and start it as a supervisor would."""
        async with self._gateway_lock:
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
        dead = time.monotonic()
        self.stage.start_gateway()
        await self.stage.answers(f"{self.stage.url}/health/liveliness")
        killed = number is signal.SIGKILL
        why, allows = ("gateway killed", KILLED) if killed else ("gateway told to stop", STOPPED)
        most = 2 * self.clients.count  # each may try again in time to wait for a worker that never takes it
        self.excuses.append(Excuse(why, began - 0.05, dead + SLACK, allows, most))
        self.excuses.append(Excuse("gateway starting", began - 0.05, time.monotonic() + SLACK, STARTING))

    async def restart_vllm(self, number: signal.Signals) -> None:
        """End vLLM and start it again; it has forgotten every adapter then."""
        async with self._vllm_lock:
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
        self._vllm_up = time.monotonic()
        self.excuses.append(Excuse("vllm down", began - 0.05, self._vllm_up + SAYING, UPSTREAM_AWAY))


def role_of(name: str) -> str:
    """Who is killed by an order that names a process, or a point."""
    if name not in points.POINTS:
        return name
    if name in points.GATEWAY_POINTS:
        return "gateway-worker"
    return "worker" if name in points.WORKER_POINTS else "trainer"
