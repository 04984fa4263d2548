"""A candidate on trial: replayed against the serving version, and measured against the base model.

The prompts are the agent's own held-out ones, never trained on. Both sides answer each prompt with the same seed and
are scored by those of the agent's rewards that can score a lone reply. KL to the base model is estimated on the
candidate's own replies as the mean of log p(candidate) - log p(base) per sampled token.

What cannot be replayed is left out and counted: traces that are damaged, and prompts that vLLM refuses. Where that is
most of them, plain questions are asked instead, so that sanity is measured in any case.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import itertools
import logging
import math
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import httpx
import sqlalchemy as sa
from metaclaw_hooks.names import version_name
from metaclaw_hooks.plugins import Plugins
from metaclaw_hooks.types import BASE_VERSION, AdapterVersion, Kind, Purpose, Session, Trace, message_text
from sqlalchemy.engine import Engine

from metaclaw_plugin.errors import SamplerRefusedError, StoreError, UnknownAgentError
from metaclaw_plugin.gateway.routing import BASE_MODEL_NAME
from metaclaw_plugin.settings import PublishSettings, Settings
from metaclaw_plugin.store.agents import get_record
from metaclaw_plugin.store.codec import decode_trace
from metaclaw_plugin.store.schema import sessions, traces
from metaclaw_plugin.worker.combine import combine
from metaclaw_plugin.worker.modes import with_own
from metaclaw_plugin.worker.policy import RewardPlan, plan_all, plan_rewards
from metaclaw_plugin.worker.sampling import Reply, Sampler
from metaclaw_plugin.worker.sanity_set import SANITY_SET, sanity_prompts
from metaclaw_plugin.worker.verdicts import Evaluation, distinct_2, paired_difference

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class EvaluationContext(Protocol):
    """The part of the worker's context that an evaluation needs."""

    @property
    def settings(self) -> Settings: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def plugins(self) -> Plugins: ...
    @property
    def http(self) -> httpx.AsyncClient: ...


@dataclass(frozen=True, slots=True)
class _Pair:
    """What both sides answered to one prompt."""

    prompt: Trace
    candidate: Reply
    serving: Reply


@dataclass(frozen=True, slots=True)
class _Replays:
    """What became of the prompts that both sides were to answer."""

    pairs: list[_Pair]
    refused: int  # by vLLM for the serving version too: too long for it by now, say
    unanswered: int  # by vLLM for the candidate alone


class Evaluator:
    """Evaluates candidates of all agents."""

    def __init__(self, ctx: EvaluationContext) -> None:
        self._ctx = ctx
        self._sampler = Sampler(ctx.http, ctx.settings.vllm.url, ctx.settings.vllm.headers)
        self._base_sanity: float | None = None  # the base model does not change

    async def evaluate(self, version: AdapterVersion, against: int, settings: PublishSettings) -> Evaluation:
        """Measure ``version`` against version ``against`` (0: the base model) of the same agent.

        Raises:
            SamplerUnavailableError: if vLLM does not answer; to be tried again later.
            SamplerRefusedError: if vLLM answers, but not with what is needed.
        """
        plan = await asyncio.to_thread(self._plan, version.agent)
        judges = [name for name in plan.turn_rewards if self._ctx.plugins.scores_lone_reply(name)]
        held_out, damaged = await asyncio.to_thread(self._held_out, version.agent, settings.replays)
        serving = _model(version.agent, against)
        replays = own = await self._answer(held_out, version.name, serving, settings)
        replayed = bool(held_out) and own.refused * 2 <= len(held_out)
        if not replayed:
            replays = await self._answer(sanity_prompts(version), version.name, serving, settings)
            if replays.refused * 2 > len(SANITY_SET):
                refused = f"vLLM refused {replays.refused} of {len(SANITY_SET)} plain questions to {serving}"
                raise SamplerRefusedError(f"{refused}: its log says why")
        pairs = replays.pairs
        found = Evaluation(
            against=against,
            difference=None,
            judged_by=tuple(judges),
            replies=len(pairs),
            kl=None,
            distinct=None,
            sanity=None,
            held_out=len(held_out),
            damaged=damaged,
            refused=own.refused,
            unanswered=replays.unanswered,
        )
        if found.mute:
            return found  # vLLM would not score it either
        scores = await self._score(pairs, judges, plan, version.number, against) if replayed and judges else []
        distinct = distinct_2(_texts(p.candidate for p in pairs)), distinct_2(_texts(p.serving for p in pairs))
        return dataclasses.replace(
            found,
            difference=paired_difference([mine for mine, _ in scores], [other for _, other in scores]),
            kl=await self._kl(pairs, settings),
            distinct=(distinct[0] or 0.0, distinct[1]) if distinct[1] is not None else None,
            sanity=await self._sanity(version.name, settings),
        )

    def _plan(self, agent: str) -> RewardPlan:
        rewards = self._ctx.settings.rewards
        with self._ctx.engine.connect() as c:
            try:
                return plan_all(self._ctx.plugins, rewards, [get_record(c, agent)])[agent]
            except UnknownAgentError:
                return plan_rewards(self._ctx.plugins, rewards, agent)

    def _held_out(self, agent: str, limit: int) -> tuple[list[Trace], int]:
        """The agent's newest held-out traces with different prompts, and how many were passed over as damaged."""
        query = (
            sa.select(traces)
            .join(sessions, sessions.c.id == traces.c.session)
            .where(traces.c.agent == agent, traces.c.kind == Kind.MAIN.value, sessions.c.held_out)
            .where(traces.c.purpose != Purpose.SUPPORT.value)
            .order_by(traces.c.seq.desc())
            .limit(4 * limit)
        )
        found: dict[str, Trace] = {}
        damaged = 0
        with self._ctx.engine.connect() as c:
            for row in c.execute(query).mappings():
                try:
                    trace = decode_trace(row)
                except StoreError as error:
                    logger.warning("not replayed: %s", error)
                    damaged += 1
                    continue
                found.setdefault(repr((trace.messages, trace.tools)), trace)
                if len(found) == limit:
                    break
        return list(found.values()), damaged

    async def _answer(
        self, prompts: Sequence[Trace], candidate: str, serving: str, settings: PublishSettings
    ) -> _Replays:
        async def reply(model: str, prompt: Trace) -> Reply | None:
            seed = zlib.crc32(prompt.id.encode())
            try:
                return await self._sampler.reply(model, prompt, settings.replay_max_tokens, seed)
            except SamplerRefusedError as error:
                logger.info("%s left out of the replays: %s", prompt.id, error)
                return None

        async def both(prompt: Trace) -> tuple[Reply | None, Reply | None]:
            other = await reply(serving, prompt)
            return other, None if other is None else await reply(candidate, prompt)

        replies = await _side_by_side(both, prompts, settings.replay_concurrency)
        asked = list(zip(prompts, replies, strict=True))
        pairs = [_Pair(prompt, mine, other) for prompt, (other, mine) in asked if other and mine]
        refused = sum(other is None for other, _ in replies)
        return _Replays(pairs, refused, len(prompts) - len(pairs) - refused)

    async def _score(
        self, pairs: Sequence[_Pair], judges: Sequence[str], plan: RewardPlan, number: int, against: int
    ) -> list[tuple[float, float]]:
        """Rewards of both sides for each prompt on which both got one."""

        async def both(pair: _Pair) -> tuple[float | None, float | None]:
            mine = await self._reward(_replayed(pair.prompt, pair.candidate, number), judges, plan)
            return mine, await self._reward(_replayed(pair.prompt, pair.serving, against), judges, plan)

        scored = await _side_by_side(both, pairs, 8)
        return [(mine, other) for mine, other in scored if mine is not None and other is not None]

    async def _reward(self, trace: Trace, judges: Sequence[str], plan: RewardPlan) -> float | None:
        session = Session(trace.session, trace.agent, trace.started_at, trace.finished_at, None, True, (trace,))
        opinions = await self._ctx.plugins.call(
            "score_trace", only=judges, trace=trace, next_trace=None, session=session
        )
        rewards = [reward for _, reward in opinions]
        combined = await self._ctx.plugins.call_first("combine_rewards", trace=trace, rewards=rewards)
        return combine(rewards, plan.weight) if combined is None else float(combined)

    async def _kl(self, pairs: Sequence[_Pair], settings: PublishSettings) -> float | None:
        async def gaps(pair: _Pair) -> list[float] | None:
            reply = pair.candidate
            ids = (*reply.prompt_token_ids, *reply.token_ids)
            try:
                base = await self._sampler.logprobs(BASE_MODEL_NAME, ids, len(reply.prompt_token_ids))
            except SamplerRefusedError as error:
                logger.info("the reply to %s is not scored: %s", pair.prompt.id, error)  # it fills the context, say
                return None
            return [mine - other for mine, other in zip(reply.logprobs, base, strict=True)]

        answered = [pair for pair in pairs if pair.candidate.token_ids]
        scored = [found for found in await _side_by_side(gaps, answered, settings.replay_concurrency) if found]
        if len(scored) * 2 < len(answered):
            unscored = f"{len(answered) - len(scored)} of {len(answered)} replies"
            raise SamplerRefusedError(f"vLLM would not score {unscored} as {BASE_MODEL_NAME}: its log says why")
        found = list(itertools.chain.from_iterable(scored))
        return math.fsum(found) / len(found) if found else None

    async def _sanity(self, model: str, settings: PublishSettings) -> tuple[float, float]:
        async def mean(name: str) -> float:
            async def one(item: tuple[str, str]) -> float:
                question, answer = item
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                return await self._sampler.conversation_logprob(name, messages)

            values = await _side_by_side(one, SANITY_SET, settings.replay_concurrency)
            return math.fsum(values) / len(values)

        if self._base_sanity is None:
            self._base_sanity = await mean(BASE_MODEL_NAME)
        return await mean(model), self._base_sanity


def _model(agent: str, number: int) -> str:
    return BASE_MODEL_NAME if number == BASE_VERSION else version_name(agent, number)


def _replayed(prompt: Trace, reply: Reply, number: int) -> Trace:
    """The trace as it would be if the reply had been given then."""
    now = time.time()
    return dataclasses.replace(
        prompt,
        id="replay-" + hashlib.sha256(f"{number}:{prompt.id}".encode()).hexdigest()[:24],
        adapter_version=number,
        model=_model(prompt.agent, number),
        response=reply.message,
        finish_reason=reply.finish_reason,
        prompt_token_ids=reply.prompt_token_ids,
        response_token_ids=reply.token_ids,
        response_logprobs=reply.logprobs,
        response_id=None,
        started_at=now,
        first_token_at=None,
        finished_at=now,
        trainable=False,
        reason="replay",
        purpose=Purpose.HELD_OUT,
    )


def _texts(replies: Iterable[Reply]) -> list[str]:
    return [message_text(reply.message) for reply in replies]


async def _side_by_side(work: Callable[[T], Awaitable[R]], items: Sequence[T], limit: int) -> list[R]:
    """``work`` on each item, at most ``limit`` at once, in order; the first failure ends the others."""
    gate = asyncio.Semaphore(limit)

    async def one(item: T) -> R:
        async with gate:
            return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]


def evaluation_settings(settings: Settings, own: Mapping[str, Any]) -> PublishSettings:
    """The gate of one agent: the global settings with the agent's own policy and bounds.

    Raises:
        ConfigError: if the agent's own cannot be used.
    """
    return with_own(settings.publish, own.get("publish"))
