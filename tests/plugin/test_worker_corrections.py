"""A reward that changes after its sample was sent: what is not trained yet is trained with the new one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from metaclaw_hooks.wire import RewardsReply

from metaclaw_plugin.errors import TrainerUnavailableError
from metaclaw_plugin.store import rewards as store
from metaclaw_plugin.store import schema
from metaclaw_plugin.worker.context import WorkerContext
from metaclaw_plugin.worker.corrections import correction_round
from metaclaw_plugin.worker.feedback import feedback_round
from metaclaw_plugin.worker.forwarding import Forwarder
from metaclaw_plugin.worker.scoring import Scorer
from tests.hook_nouns import make_trace
from tests.worker_stage import fill, rows, worker_context, worker_settings, write_hook


class Trainer:
    """A trainer's queue: rewards by trace, and what of it is being trained."""

    def __init__(self) -> None:
        self.rewards: dict[str, float] = {}
        self.in_training: set[str] = set()
        self.asked: list[dict[str, float]] = []
        self.duplicates = False
        self.away = False

    def handle(self, request: httpx.Request) -> httpx.Response:
        if self.away:
            return httpx.Response(503)
        body: dict[str, Any] = json.loads(request.content)
        if request.url.path == "/v1/samples":
            turns = [turn for sample in body["samples"] for turn in sample["turns"]]
            ids = [sample["id"] for sample in body["samples"]]
            if self.duplicates:
                return httpx.Response(200, json={"accepted": [], "duplicate": ids, "refused": []})
            self.rewards |= {turn["trace_id"]: turn["reward"] for turn in turns}
            return httpx.Response(200, json={"accepted": ids, "duplicate": [], "refused": []})
        assert request.url.path == "/v1/samples/rewards"
        asked = {change["trace_id"]: change["reward"] for change in body["rewards"]}
        self.asked.append(asked)
        free = {trace: reward for trace, reward in asked.items() if trace not in self.in_training}
        self.rewards |= free
        reply = RewardsReply(changed=sorted(free), in_training=sorted(set(asked) - set(free)))
        return httpx.Response(200, json=reply.model_dump())


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_hook(tmp_path, "r", "def score_trace(trace): return 0.5\n")
    return tmp_path


async def forwarded(ctx: WorkerContext) -> None:
    fill(ctx.engine, make_trace())
    await Scorer(ctx).round()
    await Forwarder(ctx).round()


async def say(ctx: WorkerContext, value: float) -> None:
    with ctx.engine.begin() as c:
        store.add_feedback(c, "alpha", "t1", value, "", time.time())
    assert await feedback_round(ctx) == 1


async def test_late_feedback_reaches_what_is_queued(home: Path, trainer: Trainer) -> None:
    with worker_context(worker_settings(home), httpx.MockTransport(trainer.handle)) as ctx:
        await forwarded(ctx)
        assert await correction_round(ctx) == 0
        await say(ctx, -1.0)
        assert await correction_round(ctx) == 1
        assert trainer.rewards == {"t1": -1.0}
        assert await correction_round(ctx) == 0
        assert trainer.asked == [{"t1": -1.0}], "it is told once"


async def test_rescored_traces_are_corrected_too_and_no_opinion_leaves_what_was_sent(
    home: Path, trainer: Trainer
) -> None:
    with worker_context(worker_settings(home), httpx.MockTransport(trainer.handle)) as ctx:
        await forwarded(ctx)
        for reward, expected in (("-0.25", -0.25), ("None", -0.25)):
            write_hook(home, "r", f"def score_trace(trace): return {reward}\n")
            ctx.plugins.refresh()
            with ctx.engine.begin() as c:
                store.score_again(c, "alpha")
            await Scorer(ctx).round()
            await correction_round(ctx)
            assert trainer.rewards == {"t1": expected}
            assert rows(ctx.engine, "score", "reward") == [("scored", expected)]


async def test_what_is_merged_and_not_sent_can_still_be_sent_after_nobody_has_an_opinion_any_more(
    home: Path, trainer: Trainer
) -> None:
    with worker_context(worker_settings(home), httpx.MockTransport(trainer.handle)) as ctx:
        trainer.away = True
        with pytest.raises(TrainerUnavailableError):
            await forwarded(ctx)
        write_hook(home, "r", "def score_trace(trace): return None\n")
        ctx.plugins.refresh()
        with ctx.engine.begin() as c:
            store.score_again(c, "alpha")
        await Scorer(ctx).round()
        trainer.away = False
        assert await Forwarder(ctx).round() == 1
        assert trainer.rewards == {"t1": 0.5}


async def test_a_trace_in_a_running_step_is_asked_about_again(home: Path, trainer: Trainer) -> None:
    with worker_context(worker_settings(home), httpx.MockTransport(trainer.handle)) as ctx:
        await forwarded(ctx)
        await say(ctx, -1.0)
        trainer.in_training = {"t1"}
        assert await correction_round(ctx) == 0
        assert len(trainer.asked) == 1
        trainer.in_training = set()  # the step failed, its samples wait again
        assert await correction_round(ctx) == 1
        assert trainer.rewards == {"t1": -1.0}


async def test_a_trained_trace_is_not_asked_about(home: Path, trainer: Trainer) -> None:
    with worker_context(worker_settings(home), httpx.MockTransport(trainer.handle)) as ctx:
        await forwarded(ctx)
        with ctx.engine.begin() as c:
            c.execute(sa.update(schema.traces).values(forward="trained"))
        await say(ctx, -1.0)
        assert await correction_round(ctx) == 0
        assert trainer.asked == []


@pytest.mark.law(3)
async def test_a_correction_waits_for_a_trainer_that_is_away(home: Path, trainer: Trainer) -> None:
    with worker_context(worker_settings(home), httpx.MockTransport(trainer.handle)) as ctx:
        await forwarded(ctx)
        await say(ctx, -1.0)
        trainer.away = True
        with pytest.raises(TrainerUnavailableError):
            await correction_round(ctx)
        trainer.away = False
        assert await correction_round(ctx) == 1


async def test_a_sample_whose_reply_got_lost_is_told_with_the_reward_of_now(home: Path, trainer: Trainer) -> None:
    trainer.duplicates = True  # it has them already, with whatever reward they had then
    trainer.rewards = {"t1": -0.75}
    with worker_context(worker_settings(home), httpx.MockTransport(trainer.handle)) as ctx:
        await forwarded(ctx)
        assert await correction_round(ctx) == 1
        assert trainer.rewards == {"t1": 0.5}
