"""From a version that the trainer made to the version that answers.

    read new versions ─► candidate ─► held by every vLLM ─► judged ─► route flipped ─► old one drained ─► unloaded
                                                          └► rejected, and the trainer goes back to what serves

Every arrow is one transaction of the store or one idempotent call, and each round looks at what is there and does what
is next. So a round may be killed anywhere, and two publishers at once do no more than one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from metaclaw_hooks.names import version_name
from metaclaw_hooks.types import AdapterVersion, VersionState
from metaclaw_hooks.wire import ServedReply, VersionBody

from metaclaw_plugin.errors import TrainerRefusedError, TrainerUnavailableError
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store import draining
from metaclaw_plugin.store.adapters import VersionRecord
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.store.deciding import lock_agent
from metaclaw_plugin.store.wishes import versions_before
from metaclaw_plugin.worker import settling
from metaclaw_plugin.worker.canary import judge_canary
from metaclaw_plugin.worker.evaluation import EvaluationContext
from metaclaw_plugin.worker.gate import Gate
from metaclaw_plugin.worker.heartbeats import HeartbeatWatch
from metaclaw_plugin.worker.verdicts import Decision

logger = logging.getLogger(__name__)

MAX_WAIT = 30.0  # seconds that one question for news may take; the trainer allows 60


class VersionTrainer(Protocol):
    """The part of the trainer's client that publishing needs."""

    async def versions(self, after: int, wait: float = 0.0) -> list[VersionBody]: ...
    async def set_served(self, versions: Sequence[str], keep: Sequence[str] = ()) -> ServedReply: ...
    async def set_head(self, agent: str, version: int) -> None: ...


class PublishContext(EvaluationContext, Protocol):
    """The part of the worker's context that publishing needs."""

    @property
    def trainer(self) -> VersionTrainer: ...


class Publisher:
    """Publishes for all agents. What it remembers between rounds may be lost: it is read or asked again."""

    def __init__(self, ctx: PublishContext, gate: Gate | None = None) -> None:
        self._ctx = ctx
        self._gate = gate or Gate(ctx)
        self._cursor = 0  # from the start at each start of the worker: entering a known version changes nothing
        self._watch = HeartbeatWatch(ctx.settings.publish.dead_after)
        self._asked: tuple[list[str], list[str]] = ([], [])
        self._held: frozenset[str] = frozenset()
        self._failed: dict[str, str] = {}
        self._asked_at = float("-inf")  # monotonic

    async def round(self) -> None:
        """Do everything that can be done now.

        Raises:
            TrainerUnavailableError: if the trainer does not answer. What needs no trainer was done all the same.
        """
        await asyncio.to_thread(self._end_trials)
        await self._announce()
        await asyncio.to_thread(self._drain)
        await self._read_new()
        await self._tell_heads()
        await self._reconcile()
        if await self._judge():
            await self._announce()
            await asyncio.to_thread(self._drain)
            await self._reconcile()
        await asyncio.to_thread(self._note_problems, self._gate.problems | self._failed)

    async def wait_for_news(self, seconds: float) -> None:
        """Return as soon as the trainer has a version that was not read yet, and else after ``seconds``.

        Raises:
            TrainerUnavailableError: if it does not answer.
        """
        await self._ctx.trainer.versions(self._cursor, min(seconds, MAX_WAIT))

    async def _read_new(self) -> None:
        while bodies := await self._ctx.trainer.versions(self._cursor):
            await asyncio.to_thread(self._record, bodies)
            self._cursor = max(body.cursor for body in bodies)

    def _record(self, bodies: Sequence[VersionBody]) -> None:
        with self._ctx.engine.begin() as c:
            for body in bodies:
                if store.record_candidate(c, body):
                    logger.info("%s@v%d is a candidate", body.agent, body.number)

    async def _tell_heads(self) -> None:
        def pending() -> list[store.RouteRow]:
            with self._ctx.engine.connect() as c:
                return [route for route in store.list_routes(c) if route.head is not None]

        def told(agent: str, head: int, *, refused: bool = False) -> None:
            with self._ctx.engine.begin() as c:
                lock_agent(c, agent)
                if refused:
                    count(c, "head_refused", agent)
                if store.get_route(c, agent).head == head:
                    store.set_head(c, agent, None)

        for route in await asyncio.to_thread(pending):
            head = route.head or 0
            try:
                await self._ctx.trainer.set_head(route.agent, head)
            except TrainerRefusedError as error:
                logger.warning("training of %s does not go on from version %d: %s", route.agent, head, error)
                await asyncio.to_thread(told, route.agent, head, refused=True)
                continue
            await asyncio.to_thread(told, route.agent, head)
            logger.info("the trainer goes on from version %d of %s", head, route.agent)

    async def _reconcile(self) -> None:
        """Ask the trainer to hold what shall be held, when that changed or it is time to ask again."""
        asked = wanted, keep = await asyncio.to_thread(self._wanted)
        missing = not self._held.issuperset(wanted)
        every = self._ctx.settings.publish.retry_interval if missing else self._ctx.settings.publish.refresh_interval
        now = time.monotonic()
        if asked == self._asked and now < self._asked_at + every:
            return
        self._asked, self._asked_at = asked, now
        try:
            reply = await self._ctx.trainer.set_served(wanted, keep)
        except TrainerUnavailableError:
            self._asked_at = float("-inf")
            raise
        self._held = frozenset(reply.held)
        self._failed = {refusal.id: refusal.reason for refusal in reply.failed}

    def _wanted(self) -> tuple[list[str], list[str]]:
        """Names of the versions that vLLM shall hold, and of those whose files rollback may need."""
        with self._ctx.engine.connect() as c:
            candidates = store.list_versions(c, states=(VersionState.CANDIDATE,))
        for agent in sorted({record.version.agent for record in candidates}):
            with self._ctx.engine.begin() as c:
                settling.pass_over(c, agent, self._gate.judging)
        with self._ctx.engine.connect() as c:
            before = versions_before(c)
            return store.served_set(c, self._gate.judging), [version_name(*one) for one in sorted(before.items())]

    def _note_problems(self, failed: Mapping[str, str]) -> None:
        with self._ctx.engine.connect() as c:
            records = store.list_versions(c, states=(VersionState.CANDIDATE, VersionState.SERVING))
        problems = [(record, _problem(record, failed.get(record.version.name))) for record in records]
        changed = [(record, problem) for record, problem in problems if record.problem != problem]
        if not changed:
            return
        with self._ctx.engine.begin() as c:
            for record, reason in changed:
                store.update_version(c, record.version.agent, record.version.number, problem=reason)
                if reason is not None:
                    logger.warning("%s cannot be loaded: %s", record.version.name, reason)

    async def _judge(self) -> bool:
        """Settle every candidate that is held by every vLLM and has its verdict; whether there was one."""

        def candidates() -> list[tuple[VersionRecord, int]]:
            with self._ctx.engine.connect() as c:
                found = store.list_versions(c, states=(VersionState.CANDIDATE,))
                routes = {agent: store.get_route(c, agent) for agent in {record.version.agent for record in found}}
            return [
                (record, routes[record.version.agent].version)
                for record in found
                if record.wish is not None or routes[record.version.agent].canary is None  # one trial at a time
            ]

        found = await asyncio.to_thread(candidates)
        self._gate.keep_only([record.version.name for record, _ in found])
        settled = False
        for record, against in found:
            if record.version.name in self._held:
                decision = await self._gate.decide(record, against)
                if decision is not None:
                    await asyncio.to_thread(self._settle, record, decision, against)
                    settled = True
        return settled

    def _settle(self, record: VersionRecord, decision: Decision, against: int) -> None:
        version = record.version
        with self._ctx.engine.begin() as c:
            share = self._gate.settings_of(c, version.agent).canary_share
            taken = settling.settle(c, record, decision, against, share)
        if taken is not None:
            logger.info("%s %s: %s", version.name, "serves" if taken.accepted else "is rejected", taken.sentence)

    def _end_trials(self) -> None:
        """Promote or take back the canaries whose trials are over."""
        with self._ctx.engine.connect() as c:
            trials = [
                (route, judge_canary(c, route, self._gate.settings_of(c, route.agent), time.time()))
                for route in store.list_routes(c)
                if route.canary is not None
            ]
        for route, decision in trials:
            if decision is None:
                continue
            with self._ctx.engine.begin() as c:
                ended = settling.end_trial(c, route, decision)
            if ended:
                logger.info("the trial of %s@v%d is over: %s", route.agent, route.canary, decision.sentence)

    async def _announce(self) -> None:
        """Call ``adapter_published`` for what began to serve; again after a kill in between, so at least once."""

        def unannounced() -> list[AdapterVersion]:
            with self._ctx.engine.connect() as c:
                serving = store.list_versions(c, states=(VersionState.SERVING,))
            return [record.version for record in serving if record.announced_at is None]

        def announced(version: AdapterVersion) -> None:
            with self._ctx.engine.begin() as c:
                store.update_version(c, version.agent, version.number, announced_at=time.time())

        for version in await asyncio.to_thread(unannounced):
            await self._ctx.plugins.call("adapter_published", version=version)
            await asyncio.to_thread(announced, version)

    def _drain(self) -> None:
        """Retire what no request, and no exchange in progress, can need any more."""
        with self._ctx.engine.connect() as c:
            leaving = [r for r in store.list_versions(c, states=(VersionState.SERVING,)) if r.draining]
            if not leaving:
                return
            stamps = draining.heartbeats(c)
        dead = self._watch.dead(stamps)
        open_since = time.time() - self._ctx.settings.publish.tool_loop_timeout
        for record in leaving:
            version = record.version
            with self._ctx.engine.begin() as c:
                done = draining.retire_if_drained(c, version.agent, version.number, dead=dead, open_since=open_since)
            if done:
                logger.info("%s is drained", version.name)
        if dead:
            with self._ctx.engine.begin() as c:
                draining.forget_processes(c, {process: stamps[process] for process in dead})
            logger.warning("gateway processes that ended without a word: %s", ", ".join(dead))


def _problem(record: VersionRecord, reason: str | None) -> str | None:
    """Why a version is not held, and what that means where its owner waits for it."""
    if reason is None or record.wish != store.WISH_SERVE:
        return reason
    return f"{reason}; you wished for it, and until it can be loaded what serves goes on: promote another, or wait"
