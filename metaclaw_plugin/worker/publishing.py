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
from dataclasses import dataclass
from typing import Any, Protocol

import sqlalchemy as sa
from metaclaw_hooks.types import AdapterVersion, VersionState
from metaclaw_hooks.wire import ServedReply, VersionBody
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import TrainerRefusedError, TrainerUnavailableError
from metaclaw_plugin.settings import Settings
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.adapters import VersionRecord
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.worker.heartbeats import HeartbeatWatch

logger = logging.getLogger(__name__)


class VersionTrainer(Protocol):
    """The part of the trainer's client that publishing needs."""

    async def versions(self, after: int) -> list[VersionBody]: ...
    async def set_served(self, versions: Sequence[str]) -> ServedReply: ...
    async def set_head(self, agent: str, version: int) -> None: ...


class PluginCalls(Protocol):
    """The part of the plugins that publishing needs: ``(plugin name, result)`` of each that has an opinion."""

    async def call(self, hook: str, /, **kwargs: Any) -> list[tuple[str, Any]]: ...


class PublishContext(Protocol):
    """The part of the worker's context that publishing needs."""

    @property
    def settings(self) -> Settings: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def plugins(self) -> PluginCalls: ...
    @property
    def trainer(self) -> VersionTrainer: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a candidate may serve, in a sentence and in figures."""

    accepted: bool
    sentence: str
    figures: Mapping[str, Any]

    def stored(self) -> dict[str, Any]:
        return {"accepted": self.accepted, "sentence": self.sentence, **self.figures}


class Publisher:
    """Publishes for all agents. What it remembers between rounds may be lost: it is read or asked again."""

    def __init__(self, ctx: PublishContext) -> None:
        self._ctx = ctx
        self._cursor = 0  # from the start at each start of the worker: entering a known version changes nothing
        self._watch = HeartbeatWatch(ctx.settings.publish.dead_after)
        self._asked: list[str] = []
        self._held: frozenset[str] = frozenset()
        self._asked_at = float("-inf")  # monotonic

    async def round(self) -> None:
        """Do everything that can be done now.

        Raises:
            TrainerUnavailableError: if the trainer does not answer. What needs no trainer was done all the same.
        """
        await self._announce()
        await asyncio.to_thread(self._drain)
        await self._read_new()
        await self._tell_heads()
        await self._reconcile()
        if await self._judge():
            await self._announce()
            await asyncio.to_thread(self._drain)
            await self._reconcile()

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
        await asyncio.to_thread(self._note_problems, {refusal.id: refusal.reason for refusal in reply.failed})

    def _wanted(self) -> list[str]:
        with self._ctx.engine.connect() as c:
            candidates = store.list_versions(c, states=(VersionState.CANDIDATE,))
            wanted = store.served_set(c)
        if not candidates:
            return wanted
        with self._ctx.engine.begin() as c:
            for agent in {record.version.agent for record in candidates}:
                _pass_over(c, agent)
            return store.served_set(c)

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
        """Decide on every candidate that is held by every vLLM; whether there was one."""

        def candidates() -> list[VersionRecord]:
            with self._ctx.engine.connect() as c:
                return store.list_versions(c, states=(VersionState.CANDIDATE,))

        found = [record for record in await asyncio.to_thread(candidates) if record.version.name in self._held]
        for record in found:
            decision = await self._decide(record)
            await asyncio.to_thread(self._settle, record, decision)
        return bool(found)

    async def _decide(self, record: VersionRecord) -> Decision:
        version = record.version
        if record.wish == store.WISH_SERVE:
            return Decision(True, f"v{version.number}: put in place by the owner", {"policy": "owner"})
        policy = self._ctx.settings.publish.policy
        evaluation: dict[str, Any] = {"policy": policy}
        opinions = await self._ctx.plugins.call("accept_adapter", candidate=version, evaluation=evaluation)
        vetoes = [plugin for plugin, opinion in opinions if opinion is False]
        if vetoes:
            return Decision(False, f"v{version.number}: vetoed by {', '.join(vetoes)}", evaluation | {"vetoes": vetoes})
        return Decision(True, f"v{version.number}: serving, as the policy is {policy}", evaluation)

    def _settle(self, record: VersionRecord, decision: Decision) -> None:
        """Flip the route to an accepted candidate, or send the trainer back to what serves; one transaction."""
        version = record.version
        with self._ctx.engine.begin() as c:
            now = store.get_version(c, version.agent, version.number)
            if now.version.state is not VersionState.CANDIDATE or now.wish != record.wish:
                return  # another publisher, or the owner, was first
            if not decision.accepted:
                store.set_state(c, version.agent, version.number, VersionState.REJECTED, decision.stored())
                store.set_head(c, version.agent, store.get_route(c, version.agent).version)
            else:
                store.set_state(c, version.agent, version.number, VersionState.SERVING, decision.stored())
                store.update_version(c, version.agent, version.number, wish=None, problem=None, announced_at=None)
                head = version.number if record.wish == store.WISH_SERVE else None
                store.set_route(c, version.agent, version.number, head=head)
        logger.info("%s %s: %s", version.name, "serves" if decision.accepted else "is rejected", decision.sentence)

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
            draining = [r for r in store.list_versions(c, states=(VersionState.SERVING,)) if r.draining]
            if not draining:
                return
            stamps = store.heartbeats(c)
        dead = self._watch.dead(stamps)
        open_since = time.time() - self._ctx.settings.publish.tool_loop_timeout
        for record in draining:
            version = record.version
            with self._ctx.engine.begin() as c:
                done = store.retire_if_drained(c, version.agent, version.number, dead=dead, open_since=open_since)
            if done:
                logger.info("%s is drained", version.name)
        if dead:
            with self._ctx.engine.begin() as c:
                store.forget_processes(c, {process: stamps[process] for process in dead})
            logger.warning("gateway processes that ended without a word: %s", ", ".join(dead))


def _pass_over(c: sa.Connection, agent: str) -> None:
    """Settle the candidates that need no judging: older than the newest, or trained from what was rejected."""
    records = {record.version.number: record for record in store.list_versions(c, agent)}
    newest = max(records, default=0)
    for number, record in records.items():
        if record.version.state is not VersionState.CANDIDATE or record.wish is not None:
            continue
        fallen = _rejected_ancestor(records, number)
        if fallen is not None:
            decision = Decision(False, f"v{number}: trained from v{fallen}, which was rejected", {})
            store.set_state(c, agent, number, VersionState.REJECTED, decision.stored())
        elif number != newest:
            decision = Decision(False, f"v{number}: passed over for the newer v{newest}", {})
            store.set_state(c, agent, number, VersionState.RETIRED, decision.stored())


def _rejected_ancestor(records: Mapping[int, VersionRecord], number: int) -> int | None:
    """The nearest rejected version that ``number`` was trained from, with none that was accepted in between."""
    parent = records.get(records[number].version.parent)
    while parent is not None and parent.version.number < number:
        if parent.version.state is VersionState.REJECTED or parent.wish == store.WISH_WITHDRAW:
            return parent.version.number
        if (parent.decision or {}).get("accepted"):
            return None
        number, parent = parent.version.number, records.get(parent.version.parent)
    return None
