"""The gate: verdicts from figures, and candidates on trial while traffic and other agents go on."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from metaclaw_hooks.types import AdapterVersion

from metaclaw_plugin.errors import SamplerUnavailableError, StoreError
from metaclaw_plugin.settings import PublishSettings, Settings
from metaclaw_plugin.store import adapters as store
from metaclaw_plugin.store.agents import add_agent, set_settings
from metaclaw_plugin.store.engine import open_store
from metaclaw_plugin.store.wishes import promote
from metaclaw_plugin.worker.gate import Gate
from metaclaw_plugin.worker.publishing import Publisher
from metaclaw_plugin.worker.verdicts import (
    Difference,
    Evaluation,
    decide,
    distinct_2,
    paired_difference,
    student_quantile,
)
from tests.publishing_cases import Context as PublishingContext
from tests.publishing_cases import Plugins, Trainer, route, states, unasked

GOOD = Evaluation(
    against=7,
    difference=Difference(0.12, 0.05, 40),
    judged_by=("length",),
    replies=40,
    kl=0.2,
    distinct=(0.9, 0.95),
    sanity=(-2.0, -1.9),
)


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (39, 2.023)])
def test_students_quantiles_are_those_of_the_tables(freedom: int, expected: float) -> None:
    assert student_quantile(0.975, freedom) == pytest.approx(expected, abs=1e-3)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    dice = random.Random(7)
    hits = 0
    for _ in range(2000):
        noise = [dice.gauss(0.3, 1.0) for _ in range(12)]
        found = paired_difference(noise, [0.0] * 12)
        assert found is not None
        hits += abs(found.mean - 0.3) <= found.half_width
    assert 0.935 < hits / 2000 < 0.965


def test_no_pair_is_no_difference_and_one_pair_has_no_interval() -> None:
    assert paired_difference([], []) is None
    single = paired_difference([1.0], [0.5])
    assert single is not None
    assert (single.mean, math.isinf(single.half_width)) == (0.5, True)
    assert decide(8, replace(GOOD, difference=single), PublishSettings()).figures["difference"]["half_width"] is None


def test_distinct_2_sees_repetition_within_and_across_replies() -> None:
    assert distinct_2(["a b c d"]) == 1.0
    assert distinct_2(["i am i am i am"]) == pytest.approx(2 / 5)
    assert distinct_2(["i am", "i am", "i am"]) == pytest.approx(1 / 3)
    assert distinct_2(["", "word"]) is None


@pytest.mark.parametrize(
    ("policy", "mean", "half", "accepted"),
    [
        ("better", 0.12, 0.05, True),
        ("better", 0.12, 0.20, False),
        ("not_worse", 0.12, 0.20, True),
        ("not_worse", -0.12, 0.20, True),
        ("not_worse", -0.30, 0.20, False),
    ],
)
def test_each_policy_asks_what_it_says(policy: Any, mean: float, half: float, accepted: bool) -> None:
    evaluation = replace(GOOD, difference=Difference(mean, half, 40))
    assert decide(8, evaluation, PublishSettings(policy=policy)).accepted is accepted


def test_the_decision_is_a_sentence_with_its_figures() -> None:
    decision = decide(8, GOOD, PublishSettings())
    assert decision.sentence == "v8 against v7: +0.12 ± 0.05 on 40 prompts, serving"
    assert decision.stored()["difference"] == {"mean": 0.12, "half_width": 0.05, "pairs": 40}
    assert decision.stored()["judged_by"] == ("length",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kl": 1.7}, "1.70 nats per token away from the base model"),
        ({"distinct": (0.4, 0.95)}, "repeats itself"),
        ({"sanity": (-3.5, -1.9)}, "plain answers have become unlikely"),
    ],
)
def test_a_reward_earned_by_babbling_does_not_pass(changes: dict[str, Any], reason: str) -> None:
    decision = decide(8, replace(GOOD, difference=Difference(1.5, 0.01, 40), **changes), PublishSettings())
    assert not decision.accepted
    assert reason in decision.sentence


def test_without_a_lone_reply_reward_sanity_alone_decides_and_the_decision_says_so() -> None:
    lone = decide(8, replace(GOOD, difference=None, judged_by=()), PublishSettings(policy="better"))
    assert (lone.accepted, "no reward can score a lone reply, so sanity alone" in lone.sentence) == (True, True)
    empty = decide(8, replace(GOOD, difference=None, kl=5.0), PublishSettings())
    assert (empty.accepted, "no held-out prompt to replay yet" in empty.sentence) == (False, True)


@dataclass
class ScriptedJudge:
    """Figures by version name; waits until it is let go."""

    figures: dict[str, Evaluation] = field(default_factory=dict)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[tuple[str, int, str]] = field(default_factory=list)
    down: bool = False
    broken: dict[str, Exception] = field(default_factory=dict)  # by version name

    async def evaluate(self, version: AdapterVersion, against: int, settings: PublishSettings) -> Evaluation:
        self.asked.append((version.name, against, settings.policy))
        if self.down:
            raise SamplerUnavailableError("vLLM did not answer")
        if version.name in self.broken:
            raise self.broken[version.name]
        await self.go.wait()
        return replace(self.figures[version.name], against=against)


@dataclass
class Context(PublishingContext):
    judge: ScriptedJudge


@pytest.fixture
def ctx(tmp_path: Path) -> Context:
    settings = Settings(home=tmp_path, publish=PublishSettings(retry_interval=0.001))
    engine = open_store(f"sqlite:///{tmp_path / 'metaclaw.db'}")
    with engine.begin() as c:
        for name in ("ada", "bob"):
            add_agent(c, name)
        set_settings(c, "bob", {"publish": {"policy": "always"}})
    return Context(
        settings,
        engine,
        Trainer(),
        Plugins(),
        httpx.AsyncClient(transport=httpx.MockTransport(unasked)),
        ScriptedJudge(),
    )


def publisher_of(ctx: Context) -> Publisher:
    return Publisher(ctx, Gate(ctx, ctx.judge))


async def rounds(publisher: Publisher, number: int = 3) -> None:
    for _ in range(number):
        await publisher.round()
        await asyncio.sleep(0.002)


async def test_a_candidate_on_trial_holds_up_no_other_agent(ctx: Context) -> None:
    publisher = publisher_of(ctx)
    ctx.judge.figures["ada@v1"] = GOOD
    ctx.trainer.make(1, "ada")
    ctx.trainer.make(1, "bob", parent=0)
    await rounds(publisher)
    assert (route(ctx, "ada"), route(ctx, "bob")) == (0, 1)
    ctx.judge.go.set()
    await rounds(publisher)
    assert route(ctx, "ada") == 1
    assert ctx.judge.asked == [("ada@v1", 0, "not_worse")]


async def test_a_worse_candidate_never_serves_and_what_was_trained_from_it_neither(ctx: Context) -> None:
    publisher = publisher_of(ctx)
    ctx.judge.go.set()
    ctx.judge.figures = {"ada@v1": GOOD, "ada@v2": replace(GOOD, difference=Difference(-0.5, 0.1, 40))}
    ctx.trainer.make(1)
    await rounds(publisher)
    ctx.trainer.make(2)
    await rounds(publisher)
    ctx.trainer.make(3)
    await rounds(publisher)
    assert (route(ctx), states(ctx)) == (1, {1: "serving", 2: "rejected", 3: "rejected"})
    assert ctx.trainer.heads == [("ada", 1)]
    assert ctx.trainer.held == ["ada@v1"]


async def test_a_trial_is_ended_even_if_newer_versions_come_faster(ctx: Context) -> None:
    publisher = publisher_of(ctx)
    ctx.judge.figures = dict.fromkeys([f"ada@v{n}" for n in range(1, 6)], GOOD)
    for number in range(1, 6):
        ctx.trainer.make(number)
        await rounds(publisher)
    assert states(ctx) == {1: "candidate", 2: "retired", 3: "retired", 4: "retired", 5: "candidate"}
    ctx.judge.go.set()
    await rounds(publisher, 6)
    assert (route(ctx), states(ctx)[1]) == (5, "retired")
    assert ("ada@v5", 1, "not_worse") in ctx.judge.asked  # judged anew against what serves now


async def test_a_sampler_that_is_down_is_a_problem_shown_and_the_trial_is_tried_again(ctx: Context) -> None:
    publisher = publisher_of(ctx)
    ctx.judge.figures["ada@v1"] = GOOD
    ctx.judge.down = True
    ctx.trainer.make(1)
    await rounds(publisher)
    with ctx.engine.connect() as c:
        problem = store.get_version(c, "ada", 1).problem
    assert problem is not None
    assert problem.startswith("cannot be judged: vLLM did not answer (tried again every 0.001 s; ")
    assert "`metaclaw adapters promote ada@v1`" in problem
    ctx.judge.down = False
    ctx.judge.go.set()
    await rounds(publisher, 5)
    assert route(ctx) == 1
    with ctx.engine.connect() as c:
        assert store.get_version(c, "ada", 1).problem is None


@pytest.mark.parametrize("error", [StoreError("trace t1 in the store is damaged"), KeyError("choices")])
async def test_whatever_goes_wrong_in_a_trial_is_shown_tried_again_and_stops_no_other(
    ctx: Context, error: Exception
) -> None:
    with ctx.engine.begin() as c:
        add_agent(c, "zoe")
    publisher = publisher_of(ctx)
    ctx.judge.go.set()
    ctx.judge.figures = {"ada@v1": GOOD, "zoe@v1": GOOD}
    ctx.judge.broken["ada@v1"] = error
    ctx.trainer.make(1)
    ctx.trainer.make(1, "zoe", parent=0)
    await rounds(publisher, 5)
    assert (route(ctx, "ada"), route(ctx, "zoe"), ctx.plugins.published) == (0, 1, ["zoe@v1"])
    with ctx.engine.connect() as c:
        problem = store.get_version(c, "ada", 1).problem
    assert problem is not None
    assert "cannot be judged" in problem
    assert str(error) in problem
    ctx.judge.broken.clear()
    await rounds(publisher, 5)
    assert route(ctx, "ada") == 1
    with ctx.engine.connect() as c:
        assert store.get_version(c, "ada", 1).problem is None


async def test_the_owners_word_ends_a_trial(ctx: Context) -> None:
    publisher = publisher_of(ctx)
    ctx.judge.figures["ada@v1"] = GOOD
    ctx.trainer.make(1)
    await rounds(publisher)
    with ctx.engine.begin() as c:
        promote(c, "ada", 1)
    await rounds(publisher)
    assert route(ctx) == 1
    with ctx.engine.connect() as c:
        assert (store.get_version(c, "ada", 1).decision or {})["policy"] == "owner"
