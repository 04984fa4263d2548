"""Scores traces: claim with a lease, ask the reward hooks, combine, store.

Many traces are under way at once, so that slow rewards (a judge) overlap; results are stored in groups, so that quick
ones are not held up by commits. Whoever is killed in between holds leases that run out; nothing is scored twice, since
a result is stored only by the holder of the lease.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from metaclaw_hooks.types import Reward, Session, Trace

from metaclaw_plugin.errors import StoreError
from metaclaw_plugin.skills.support import reserve_support
from metaclaw_plugin.store import leases
from metaclaw_plugin.store.agents import list_agents
from metaclaw_plugin.store.codec import decode_trace
from metaclaw_plugin.store.hook_counters import add_hook_stats
from metaclaw_plugin.store.rewards import Outcome, feedback_on, record_outcomes
from metaclaw_plugin.store.schema import traces
from metaclaw_plugin.worker.combine import best_hint, combine
from metaclaw_plugin.worker.context import WorkerContext
from metaclaw_plugin.worker.credit import main_turns, share_of
from metaclaw_plugin.worker.evidence import load_evidence
from metaclaw_plugin.worker.policy import RewardPlan, Wait, plan_all, plan_rewards

logger = logging.getLogger(__name__)

LOOK_EVERY = 0.5  # seconds between looks for new or edited plugin files
GROUP = 0.02  # seconds in which further results may join one transaction
KNOWN_OUTCOMES = 256  # of whole sessions, held in memory


@dataclass(frozen=True, slots=True)
class Claimed:
    """A trace under lease, with what the hooks are to see."""

    seq: int
    trace: Trace
    next_trace: Trace | None
    session: Session
    feedback: Reward | None


class Scorer:
    """Scores for all agents."""

    def __init__(self, ctx: WorkerContext) -> None:
        self._ctx = ctx
        self._looked_at = float("-inf")  # monotonic: when the folder of hooks was last read
        self._plans: dict[str, RewardPlan] = {}
        self._outcomes: OrderedDict[tuple[str, str], asyncio.Task[Reward | None]] = OrderedDict()

    async def round(self) -> int:
        """Score all that is ready; returns how many traces that were.

        No agent has more than half of the places, so that one whose rewards are slow does not hold up the others.
        """
        share = max(1, self._ctx.settings.worker.concurrency // 2)
        poll = self._ctx.settings.worker.poll_interval
        pending: dict[asyncio.Task[Outcome], str] = {}
        scored = 0
        try:
            while True:
                if room := len(pending) <= share:
                    places = Counter(pending.values())
                    full = [agent for agent, taken in places.items() if 2 * taken > share]
                    claimed, broken = await asyncio.to_thread(self._claim, share, full)
                    pending |= {asyncio.create_task(self.score(item)): item.trace.agent for item in claimed}
                    scored += await asyncio.to_thread(self._store, broken) if broken else 0
                if not pending:
                    return scored
                await asyncio.wait(pending, timeout=poll if room else None, return_when=asyncio.FIRST_COMPLETED)
                if not all(task.done() for task in pending):
                    await asyncio.sleep(GROUP)
                finished = [task for task in pending if task.done()]
                for task in finished:
                    del pending[task]
                if finished:
                    scored += await asyncio.to_thread(self._store, [task.result() for task in finished])
        finally:
            for task in pending:
                task.cancel()

    def _claim(self, limit: int, not_of: Sequence[str]) -> tuple[list[Claimed], list[Outcome]]:
        if time.monotonic() > self._looked_at + LOOK_EVERY:
            self._ctx.plugins.refresh()
            self._looked_at = time.monotonic()
        now = time.time()
        settings = self._ctx.settings
        with self._ctx.engine.connect() as c:
            self.make_plans(c)
            ready = leases.ready_to_score(
                now,
                settings.worker.evidence_timeout,
                immediate=self._that_wait_for(Wait.NOTHING),
                whole_session=self._that_wait_for(Wait.CLOSED),
            )
            ready = sa.and_(ready, traces.c.agent.not_in(not_of))
            if c.execute(sa.select(traces.c.seq).where(ready).limit(1)).first() is None:
                return [], []  # looking must not take the write lock that the gateway commits under
        until = now + settings.worker.lease + 2 * self._ctx.plugins.longest_call
        with self._ctx.engine.begin() as c:
            seqs = leases.claim_traces(c, ready, self._ctx.owner, until, limit)
        with self._ctx.engine.connect() as c:
            return self.load(c, seqs)

    def make_plans(self, c: sa.Connection) -> None:
        """Look anew at which rewards are on for whom."""
        self._plans = plan_all(self._ctx.plugins, self._ctx.settings.rewards, list_agents(c))

    def load(self, c: sa.Connection, seqs: Sequence[int]) -> tuple[list[Claimed], list[Outcome]]:
        """The traces with the evidence about them; and for those that are damaged, that they are."""
        found: list[tuple[int, Trace]] = []
        broken: list[Outcome] = []
        for row in c.execute(sa.select(traces).where(traces.c.seq.in_(seqs)).order_by(traces.c.seq)).mappings():
            try:
                found.append((row["seq"], decode_trace(row)))
            except StoreError as error:
                logger.error("trace %s cannot be scored: %s", row["id"], error)
                broken.append(Outcome(row["seq"], row["id"], row["agent"], (), None, None, False, str(error), None))
        plugins = self._ctx.plugins
        evidence = load_evidence(
            c,
            [trace for _, trace in found],
            next_traces=plugins.takes("score_trace", "next_trace"),
            whole_sessions=plugins.takes("score_trace", "session")
            or any(plan.session_rewards for plan in self._plans.values()),
        )
        said = feedback_on(c, [trace.id for _, trace in found])
        claimed = [
            Claimed(seq, trace, evidence.following(trace), evidence.session(trace), said.get(trace.id))
            for seq, trace in found
        ]
        return claimed, broken

    async def score(self, item: Claimed) -> Outcome:
        """Ask the rewards that are on, and combine what they say."""
        trace = item.trace
        plan = self.plan(trace.agent)
        results = await self._ctx.plugins.call(
            "score_trace", only=plan.turn_rewards, trace=trace, next_trace=item.next_trace, session=item.session
        )
        inferred = [reward for _, reward in results]
        for name in plan.session_rewards:
            outcome = await self._session_outcome(name, item.session)
            if outcome is not None:
                inferred.append(share_of(outcome, trace, item.session, plan.settings))
        opinions = inferred if item.feedback is None else [*inferred, item.feedback]
        combined = await self._ctx.plugins.call_first("combine_rewards", trace=trace, rewards=opinions)
        return Outcome(
            seq=item.seq,
            trace_id=trace.id,
            agent=trace.agent,
            rewards=tuple(inferred),
            combined=combine(opinions, plan.weight) if combined is None else combined,
            hint=best_hint(opinions),
            held_out=item.session.held_out,
            unusable=None if trace.trainable else trace.reason or "not trainable",
            feedback=None if item.feedback is None else item.feedback.value,
        )

    def plan(self, agent: str) -> RewardPlan:
        """How traces of ``agent`` are scored."""
        if agent not in self._plans:  # removed since, or never added: its traces are scored all the same
            self._plans[agent] = plan_rewards(self._ctx.plugins, self._ctx.settings.rewards, agent)
        return self._plans[agent]

    def _that_wait_for(self, wait: Wait) -> list[str]:
        return [agent for agent, plan in self._plans.items() if plan.wait is wait]

    async def _session_outcome(self, plugin: str, session: Session) -> Reward | None:
        """What ``plugin`` says of the whole session; asked once, though each of its turns wants to know."""
        turns = main_turns(session)
        if not turns:
            return None
        key = (plugin, turns[-1].id)
        if key not in self._outcomes:
            asking = self._ctx.plugins.call(
                "score_trace", only=(plugin,), trace=turns[-1], next_trace=None, session=session
            )
            self._outcomes[key] = asyncio.create_task(_only_reward(asking))
            while len(self._outcomes) > KNOWN_OUTCOMES:
                self._outcomes.popitem(last=False)
        return await asyncio.shield(self._outcomes[key])

    def _store(self, outcomes: Sequence[Outcome]) -> int:
        now = time.time()
        evolution = self._ctx.settings.skills.evolution
        with self._ctx.engine.begin() as c:
            stored = record_outcomes(c, outcomes, self._ctx.owner, now)
            if evolution.model is not None:  # here, so that no failure is forwarded before the evolver had its choice
                least = evolution.failure_reward
                failed = {o.agent for o in stored if o.combined is not None and o.combined <= least}
                for record in list_agents(c) if failed else ():
                    if record.name in failed:
                        reserve_support(c, record.agent(self._ctx.settings.mode), evolution, now, now - 1.0)
        return len(stored)


async def _only_reward(asking: Awaitable[list[tuple[str, Reward]]]) -> Reward | None:
    return next((reward for _, reward in await asking), None)


def store_hook_counters(ctx: WorkerContext) -> Mapping[tuple[str, str], int]:
    """Add what the plugins did since the last time to the store's counters; returns the calls, by plugin and hook."""
    fresh = ctx.plugins.take_stats()
    if fresh:
        with ctx.engine.begin() as c:
            add_hook_stats(c, fresh)
    return {key: stats.calls for key, stats in fresh.items()}


def settle_side_traces(ctx: WorkerContext) -> int:
    """Side requests are never scored or trained: say so on them; returns how many."""
    t = traces.c
    waiting = sa.and_(t.score == "waiting", t.kind == "side")
    with ctx.engine.connect() as c:
        if c.execute(sa.select(t.seq).where(waiting).limit(1)).first() is None:
            return 0
    with ctx.engine.begin() as c:
        values = {"score": "unscored", "forward": "skipped", "forward_reason": "side request"}
        return c.execute(sa.update(traces).where(waiting).values(**values)).rowcount
