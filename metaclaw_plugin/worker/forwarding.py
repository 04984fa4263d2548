"""Hands samples to the trainer: at least once, under a key that makes the second time do nothing, in order per agent.

    scored ─► merged (one transaction: which traces are which sample) ─► sent ─► forwarded, or skipped with the reason

A kill between any two of these loses nothing: what is merged is sent again with the same id and the same tokens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from metaclaw_hooks.errors import InvalidSampleError
from metaclaw_hooks.types import Mode, Sample
from metaclaw_hooks.wire import SamplesReply

from metaclaw_plugin.errors import TrainerFullError, TrainerRefusedError, TrainerUnavailableError
from metaclaw_plugin.skills.support import is_kept
from metaclaw_plugin.store import forwarding as store
from metaclaw_plugin.store import leases
from metaclaw_plugin.store.agents import list_agents
from metaclaw_plugin.store.corrections import mark_told
from metaclaw_plugin.store.counters import count
from metaclaw_plugin.store.forwarding import ScoredTurn
from metaclaw_plugin.worker.backoff import Backoff
from metaclaw_plugin.worker.context import WorkerContext
from metaclaw_plugin.worker.samples import make_sample, merge

logger = logging.getLogger(__name__)

MERGE_LIMIT = 512  # traces that are merged in one transaction
SEND_LIMIT = 64  # samples in one request
SEND_TOKENS = 200_000  # tokens in one request, about: a few MB of JSON
LEASE = 150.0  # seconds: longer than one request may take


class Forwarder:
    """Forwards for all agents. Several may run: an agent is one forwarder's at a time, which keeps its order."""

    def __init__(self, ctx: WorkerContext) -> None:
        self._ctx = ctx
        self._trouble: dict[str, Backoff] = {}  # agents that wait by themselves
        evolution = ctx.settings.skills.evolution
        # While a session may still fail, what the evolver would then be shown of it must not have been sent.
        self._held = (lambda session: is_kept(session, evolution.support_share)) if evolution.model else None

    async def round(self) -> int:
        """Send all that may be sent now; returns how many samples the trainer took.

        What is wrong with one agent alone, such as a full queue, holds up no other.

        Raises:
            TrainerUnavailableError: if it does not answer; everything stays queued.
            TrainerRefusedError: if it will not have what is sent; everything stays queued.
        """
        taken = 0
        for agent in await asyncio.to_thread(self._agents):
            if agent in self._trouble and self._trouble[agent].waiting:
                continue
            try:
                taken += await self._forward(agent)
                self._trouble.pop(agent, None)
            except TrainerFullError as error:
                if agent not in self._trouble:
                    logger.warning("samples of %s wait, those of other agents go on: %s", agent, error)
                self._pause(agent)
            except (TrainerUnavailableError, TrainerRefusedError):
                raise
            except Exception:  # isolation boundary: what one agent's rows hold must not stop the others
                logger.exception("forwarding of %s failed and is tried again; other agents go on", agent)
                await asyncio.to_thread(self._count_failure, agent)
                self._pause(agent)
        return taken

    async def _forward(self, agent: str) -> int:
        """Send what there is of one agent, unless another worker is at it."""
        if not await asyncio.to_thread(self._acquire, agent):
            return 0
        taken = 0
        try:
            while True:
                taken += await self._send_merged(agent)
                if not await asyncio.to_thread(self._merge, agent):
                    return taken
        finally:
            await asyncio.to_thread(self._release, agent)

    def _pause(self, agent: str) -> None:
        self._trouble.setdefault(agent, Backoff()).fail(self._ctx.settings.worker.max_backoff)

    def _count_failure(self, agent: str) -> None:
        with self._ctx.engine.begin() as c:
            count(c, "worker_failures", f"forwarding of {agent}")

    def _agents(self) -> list[str]:
        with self._ctx.engine.connect() as c:
            work = set(store.agents_with_work(c))
            if not work:
                return []
            default = self._ctx.settings.mode
            learn = [a.name for a in list_agents(c) if a.effective_mode(default) in (Mode.RL, Mode.AUTO)]
        return [name for name in learn if name in work]

    def _lease(self, agent: str) -> str:
        return f"forward:{agent}"

    def _acquire(self, agent: str) -> bool:
        with self._ctx.engine.begin() as c:
            return leases.acquire(c, self._lease(agent), self._ctx.owner, time.time(), LEASE)

    def _release(self, agent: str) -> None:
        with self._ctx.engine.begin() as c:
            leases.release(c, self._lease(agent), self._ctx.owner)

    def _merge(self, agent: str) -> int:
        """Settle which traces are which sample; returns how many samples that made."""
        worker = self._ctx.settings.worker
        with self._ctx.engine.connect() as c:
            turns = store.mergeable(c, agent, time.time(), worker.merge_wait, MERGE_LIMIT, self._held)
        if not turns:
            return 0
        made = 0
        with self._ctx.engine.begin() as c:
            if worker.strict_query:
                newest = next(a.skill_generation for a in list_agents(c) if a.name == agent)
                if store.set_aside_generations(c, agent, newest):
                    turns = [turn for turn in turns if turn.skill_generation >= newest]
            samples: dict[str, list[ScoredTurn]] = {}
            for run in merge(turns, worker.max_sample_tokens):
                try:
                    samples[make_sample(run).id] = run
                except InvalidSampleError as error:
                    logger.warning("traces of %s make no sample: %s", agent, error)
                    count(c, "samples_invalid", agent)
                    store.mark_unusable(c, [turn.seq for turn in run], str(error))
                    made += 1
            made += len(store.mark_merged(c, samples))
        return made

    async def _send_merged(self, agent: str) -> int:
        taken = 0
        while runs := await asyncio.to_thread(self._read_merged, agent):
            for batch in batches([make_sample(run) for run in runs]):
                if not await asyncio.to_thread(self._acquire, agent):
                    return taken  # this took so long that another worker has the agent now
                taken += await self._send(agent, batch)
        return taken

    def _read_merged(self, agent: str) -> list[list[ScoredTurn]]:
        with self._ctx.engine.connect() as c:
            return store.merged(c, agent, SEND_LIMIT)

    async def _send(self, agent: str, samples: Sequence[Sample]) -> int:
        """Send one batch. One that is refused whole is halved, so that one bad sample costs only itself."""
        try:
            reply = await self._ctx.trainer.send_samples(samples)
        except TrainerRefusedError as error:
            if error.status not in (400, 413, 422):
                raise
            if len(samples) == 1:
                await asyncio.to_thread(self._skip, agent, samples[0].id, str(error))
                return 0
            middle = len(samples) // 2
            return await self._send(agent, samples[:middle]) + await self._send(agent, samples[middle:])
        answered = {*reply.accepted, *reply.duplicate, *(refusal.id for refusal in reply.refused)}
        if missing := {sample.id for sample in samples} - answered:
            raise TrainerRefusedError(
                f"the trainer's answer leaves out {len(missing)} of {len(samples)} samples of {agent}"
            )
        await asyncio.to_thread(self._note, agent, reply, samples)
        return len(reply.accepted)

    def _note(self, agent: str, reply: SamplesReply, samples: Sequence[Sample]) -> None:
        accepted = set(reply.accepted)
        told = [(turn.trace_id, turn.reward) for sample in samples if sample.id in accepted for turn in sample.turns]
        with self._ctx.engine.begin() as c:
            store.mark_forwarded(c, [*reply.accepted, *reply.duplicate])
            mark_told(c, told)  # of a duplicate it is not known with which reward it came the first time
            if reply.accepted:
                count(c, "samples_forwarded", agent, len(reply.accepted))
            for refusal in reply.refused:
                store.mark_skipped(c, refusal.id, refusal.reason)
                count(c, "samples_refused", agent)
                logger.warning("the trainer refused sample %s of %s: %s", refusal.id, agent, refusal.reason)

    def _skip(self, agent: str, sample_id: str, reason: str) -> None:
        logger.warning("sample %s of %s is skipped: %s", sample_id, agent, reason)
        with self._ctx.engine.begin() as c:
            store.mark_skipped(c, sample_id, reason)
            count(c, "samples_refused", agent)


def batches(samples: Sequence[Sample]) -> list[list[Sample]]:
    """``samples`` in order, in groups that are one request each."""
    groups: list[list[Sample]] = []
    tokens = 0
    for sample in samples:
        if not groups or tokens + len(sample.token_ids) > SEND_TOKENS:
            groups.append([])
            tokens = 0
        groups[-1].append(sample)
        tokens += len(sample.token_ids)
    return groups


class Tracker:
    """Reads from the trainer's versions which traces were trained on."""

    def __init__(self, ctx: WorkerContext) -> None:
        self._ctx = ctx
        self._cursor = 0  # from the first version at each start: marking again changes nothing

    async def round(self) -> int:
        """Mark what new versions learned from; returns how many traces that is new for.

        Raises:
            TrainerUnavailableError: if the trainer does not answer.
        """
        marked = 0
        while versions := await self._ctx.trainer.versions(self._cursor):
            for version in versions:
                marked += await asyncio.to_thread(self._mark, version.trace_ids)
            self._cursor = max(version.cursor for version in versions)
        return marked

    def _mark(self, trace_ids: Sequence[str]) -> int:
        with self._ctx.engine.begin() as c:
            return store.mark_trained(c, trace_ids) if trace_ids else 0
