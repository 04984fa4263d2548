"""One agent's lesson: rounds of talk, each answered by the version that the rounds before it made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import httpx

from demo.measure import BaseModel, distinct2
from demo.prompts import held_out_prompts, training_prompts
from demo.stage import BATCH_SIZE, Stage
from demo.talk import Reply, Talker, until

HELD_OUT = 48  # questions
WINDOW = 16  # interactions that one point of the curve averages over
GAIN = 0.5  # what an agent is to gain, on the scale of rewards
ENOUGH = 0.8  # mean of a window at which a lesson ends: to go on would teach the agent nothing but to repeat itself
PATIENCE = 90.0  # seconds that a round waits for the version that the round before it made


class LessonError(RuntimeError):
    """A lesson that cannot go on: the system does not answer."""


@dataclass(frozen=True)
class Exam:
    """How an agent did on the held-out questions."""

    replies: list[Reply]
    reward: float
    distinct2: float

    def base_loglik(self, model: BaseModel, on_scored: Callable[[], None]) -> float:
        """Mean log-likelihood of the replies under the base model, in nats per token."""
        return model.log_likelihood([(reply.prompt, reply.text) for reply in self.replies], on_scored)


@dataclass
class Lesson:
    """What came of one agent's talk so far."""

    talker: Talker
    stage: Stage
    key: str
    seed: int
    rewards: list[float] = field(default_factory=list)  # of every training interaction, in order
    versions: list[tuple[int, int]] = field(default_factory=list)  # (interactions so far, version)
    before: Exam | None = None
    after: Exam | None = None

    @property
    def agent(self) -> str:
        return self.talker.agent

    async def examine(self, on_reply: Callable[[], None]) -> Exam:
        """Ask the held-out questions; they are not recorded."""
        replies = await self.talker.ask_all(held_out_prompts(HELD_OUT), record=False, on_reply=on_reply)
        if not replies:
            raise LessonError(f"{self.agent} answered no held-out question: {self.talker.failures[-1]}")
        return Exam(replies, _mean([reply.reward for reply in replies]), distinct2([reply.text for reply in replies]))

    async def practise(self, rounds: int, on_reply: Callable[[], None], on_version: Callable[[int], None]) -> None:
        """Talk for ``rounds`` rounds of one batch each, or until it is enough."""
        prompts = training_prompts(self.seed)
        if self.stage.shuffled:
            # The control leaves the first answer without a reward; without one more, the first batch never fills.
            await self.talker.ask_all(prompts[-1:], record=True)
        async with httpx.AsyncClient(base_url=self.stage.gateway, timeout=30) as client:
            for number in range(rounds):
                batch = [prompts[(number * BATCH_SIZE + i) % len(prompts)] for i in range(BATCH_SIZE)]
                replies = await self.talker.ask_all(batch, record=True, on_reply=on_reply)
                self.rewards += [reply.reward for reply in replies]
                await self._next_version(client, on_version)
                if len(self.rewards) >= WINDOW and _mean(self.rewards[-WINDOW:]) >= ENOUGH:
                    return

    async def _next_version(self, client: httpx.AsyncClient, on_version: Callable[[int], None]) -> None:
        """Wait for the version that this round makes; a round that made none (no signal) goes on without."""
        known = self.versions[-1][1] if self.versions else 0

        async def newer() -> bool:
            version = await self._serving(client)
            if version <= known:
                return False
            self.versions.append((len(self.rewards), version))
            on_version(version)
            return True

        await until(newer, PATIENCE)

    async def _serving(self, client: httpx.AsyncClient) -> int:
        try:
            reply = await client.get("/metaclaw/v1/status", headers={"Authorization": f"Bearer {self.key}"})
            reply.raise_for_status()
        except httpx.HTTPError as error:
            raise LessonError(f"the gateway does not tell how {self.agent} is doing: {error}") from error
        return int(next(one["adapter_version"] for one in reply.json()["agents"] if one["agent"] == self.agent))

    def curve(self) -> list[tuple[int, float]]:
        """(interactions, mean reward of the last ``WINDOW``) after every interaction from the first full window on."""
        ends = range(min(WINDOW, len(self.rewards)), len(self.rewards) + 1)
        return [(end, _mean(self.rewards[max(0, end - WINDOW) : end])) for end in ends if end]

    def interactions_to_gain(self) -> int | None:
        """How many interactions it took to gain ``GAIN``; None: more than there were.

        On the curve, from its first window: exam and lesson ask different questions, so one is no start for the other.
        A curve that starts high has no room for it; where the exam shows the gain, it took at most the whole lesson.
        """
        curve = self.curve()
        found = next((count for count, reward in curve if reward >= curve[0][1] + GAIN), None)
        if found is None and self.before and self.after and self.after.reward - self.before.reward >= GAIN:
            return len(self.rewards)
        return found


async def practise_together(
    lessons: list[Lesson], rounds: int, on_reply: Callable[[str], None], on_version: Callable[[str, int], None]
) -> None:
    """All agents at once, each at its own pace: one is answered while the other's version is trained or loaded."""
    await asyncio.gather(
        *(
            lesson.practise(rounds, partial(on_reply, lesson.agent), partial(on_version, lesson.agent))
            for lesson in lessons
        )
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
