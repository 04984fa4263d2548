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
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import sqlalchemy as sa
from metaclaw_hooks.types import BASE_VERSION, AdapterVersion, VersionState
from metaclaw_hooks.wire import ServedReply, VersionBody

from metaclaw_plugin.errors import TrainerRefusedError, TrainerUnavailableError
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store import draining
from metaclaw_plugin.store.adapters import VersionRecord
from metaclaw_plugin.store.counters import count
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
    async def set_served(self, versions: Sequence[str]) -> ServedReply: ...
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
        self._asked: list[str] = []
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
        wanted = await asyncio.to_thread(self._wanted)
        missing = not self._held.issuperset(wanted)
        every = self._ctx.settings.publish.retry_interval if missing else self._ctx.settings.publish.refresh_interval
        now = time.monotonic()
        if wanted == self._asked and now < self._asked_at + every:
            return
        self._asked, self._asked_at = wanted, now
        try:
            reply = await self._ctx.trainer.set_served(wanted)
        except TrainerUnavailableError:
            self._asked_at = float("-inf")
            raise
        self._held = frozenset(reply.held)
        self._failed = {refusal.id: refusal.reason for refusal in reply.failed}

    def _wanted(self) -> list[str]:
        with self._ctx.engine.connect() as c:
            candidates = store.list_versions(c, states=(VersionState.CANDIDATE,))
            wanted = store.served_set(c, self._gate.judging)
        if not candidates:
            return wanted
        with self._ctx.engine.begin() as c:
            for agent in {record.version.agent for record in candidates}:
                _pass_over(c, agent, self._gate.judging)
            return store.served_set(c, self._gate.judging)

    def _note_problems(self, failed: Mapping[str, str]) -> None:
        with self._ctx.engine.connect() as c:
            records = store.list_versions(c, states=(VersionState.CANDIDATE, VersionState.SERVING))
        changed = [record for record in records if record.problem != failed.get(record.version.name)]
        if not changed:
            return
        with self._ctx.engine.begin() as c:
            for record in changed:
                reason = failed.get(record.version.name)
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
                    await asyncio.to_thread(self._settle, record, decision)
                    settled = True
        return settled

    def _settle(self, record: VersionRecord, decision: Decision) -> None:
        """Flip the route to an accepted candidate, or send the trainer back to what serves; one transaction."""
        version = record.version
        with self._ctx.engine.begin() as c:
            now = store.get_version(c, version.agent, version.number)
            if now.version.state is not VersionState.CANDIDATE or now.wish != record.wish:
                return  # another publisher, or the owner, was first
            serving = store.get_route(c, version.agent).version
            if decision.figures.get("against", serving) != serving:
                return  # judged against a version that no longer serves: judged again
            if not decision.accepted:
                store.set_state(c, version.agent, version.number, VersionState.REJECTED, decision.stored())
                store.set_head(c, version.agent, serving)
            else:
                store.set_state(c, version.agent, version.number, VersionState.SERVING, decision.stored())
                store.update_version(c, version.agent, version.number, wish=None, problem=None, announced_at=None)
                wished = record.wish == store.WISH_SERVE
                share = 0.0 if wished else self._gate.settings_of(c, version.agent).canary_share
                if share and serving != BASE_VERSION:
                    store.set_canary(c, version.agent, version.number, share)
                else:
                    store.set_route(c, version.agent, version.number, head=version.number if wished else None)
        logger.info("%s %s: %s", version.name, "serves" if decision.accepted else "is rejected", decision.sentence)

    def _end_trials(self) -> None:
        """Promote or take back the canaries whose trials are over."""
        with self._ctx.engine.connect() as c:
            if not any(route.canary is not None for route in store.list_routes(c)):
                return
        with self._ctx.engine.begin() as c:
            for route in store.list_routes(c):
                decision = judge_canary(c, route, self._gate.settings_of(c, route.agent), time.time())
                if decision is None or route.canary is None:
                    continue
                stored = {"decision": decision.stored(), "decided_at": store.decision_time(c, route.agent)}
                if decision.accepted:
                    store.set_route(c, route.agent, route.canary)
                    store.update_version(c, route.agent, route.canary, **stored)
                else:
                    store.end_canary(c, route.agent)
                    store.set_head(c, route.agent, route.version)
                    store.update_version(c, route.agent, route.canary, wish=store.WISH_WITHDRAW, **stored)
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


def _pass_over(c: sa.Connection, agent: str, judging: Collection[str]) -> None:
    """Settle the candidates that need no judging: older than the newest, or trained from what was rejected.

    One that is being judged (its name is in ``judging``) is judged to the end, however many newer ones there are.
    """
    newest = store.newest_number(c, agent)
    for record in store.list_versions(c, agent, states=(VersionState.CANDIDATE,)):
        number = record.version.number
        if record.wish is not None:
            continue
        fallen = _rejected_ancestor(c, record)
        if fallen is not None:
            decision = Decision(False, f"v{number}: trained from v{fallen}, which was rejected", {})
            store.set_state(c, agent, number, VersionState.REJECTED, decision.stored())
        elif number != newest and record.version.name not in judging:
            decision = Decision(False, f"v{number}: passed over for the newer v{newest}", {})
            store.set_state(c, agent, number, VersionState.RETIRED, decision.stored())


def _rejected_ancestor(c: sa.Connection, record: VersionRecord) -> int | None:
    """The nearest rejected version that this one was trained from, with none that was accepted in between."""
    version = record.version
    while found := store.list_versions(c, version.agent, number=version.parent):
        parent = found[0]
        if parent.version.number >= version.number:
            return None
        if parent.version.state is VersionState.REJECTED or parent.wish == store.WISH_WITHDRAW:
            return parent.version.number
        if (parent.decision or {}).get("accepted"):
            return None
        version = parent.version
    return None
