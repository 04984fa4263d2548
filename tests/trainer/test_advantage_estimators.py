"""Advantages against values worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
from metaclaw_trainer.advantages import Baseline, estimate, explain_silence, given
from metaclaw_trainer.errors import AdvantageError
from metaclaw_trainer.settings import TrainerSettings

from tests.trainer.engine_parts import random_sample


def settings(**values: object) -> TrainerSettings:
    return TrainerSettings(**values)  # type: ignore[arg-type]


def batch(*rewards: float):
    return [random_sample(i, rewards=(r,)) for i, r in enumerate(rewards)]


def flat(values: tuple[tuple[float, ...], ...]) -> list[float]:
    return [value for turns in values for value in turns]


def test_running_baseline_without_history_leaves_the_own_reward_out_and_shrinks_to_zero() -> None:
    # others of 1.0 sum to 0.5 + 0.0; the prior weighs one reward of 0: baseline 0.5 / 3
    found = estimate(batch(1.0, 0.5, 0.0), Baseline(), settings(baseline_prior=1.0))
    assert flat(found.values) == pytest.approx([1 - 0.5 / 3, 0.5 - 1 / 3, 0 - 1.5 / 3])


def test_running_baseline_remembers_earlier_batches() -> None:
    before = Baseline(weight=10.0, mean=0.4, square=0.2)
    found = estimate(batch(1.0), before, settings(baseline_prior=1.0))
    assert flat(found.values) == pytest.approx([1.0 - 4.0 / 11.0])


def test_a_single_sample_is_never_silent_unless_its_reward_is_the_baseline() -> None:
    assert flat(estimate(batch(0.8), Baseline(), settings()).values) == pytest.approx([0.8])
    assert not estimate(batch(0.8), Baseline(), settings()).silent
    assert estimate(batch(0.8), Baseline(), settings(advantage="batch")).silent  # the ancestor's silent non-learning


def test_the_baseline_of_a_turn_does_not_depend_on_its_own_reward() -> None:
    low = estimate(batch(-1.0, 0.3, 0.1), Baseline(5.0, 0.2, 0.1), settings())
    high = estimate(batch(1.0, 0.3, 0.1), Baseline(5.0, 0.2, 0.1), settings())
    assert high.values[0][0] - low.values[0][0] == pytest.approx(2.0)


def test_the_baseline_fades_so_that_it_follows_a_policy_that_improves() -> None:
    baseline = Baseline()
    for _ in range(20):
        baseline = baseline.updated([0.0] * 8, memory=32.0)
    assert (baseline.weight, baseline.mean) == (32.0, 0.0)
    for _ in range(8):
        baseline = baseline.updated([1.0] * 8, memory=32.0)
    assert baseline.mean == pytest.approx(1 - 0.75**8)


def test_a_batch_larger_than_the_memory_replaces_what_was_remembered() -> None:
    after = Baseline(32.0, -1.0, 1.0).updated([0.5] * 40, memory=32.0)
    assert (after.weight, after.mean) == (32.0, 0.5)


def test_group_centres_same_prompts_and_leaves_a_lone_prompt_to_the_running_baseline() -> None:
    shared = [random_sample(1, rewards=(r,)) for r in (1.0, 0.0)]  # the same seed: the same prompt
    alone = random_sample(2, rewards=(0.5,))
    found = estimate([*shared, alone], Baseline(), settings(advantage="group", baseline_prior=1.0))
    assert flat(found.values) == pytest.approx([1.0, -1.0, 0.5 - 1.0 / 3])


def test_batch_centres_on_the_mean_and_raw_on_nothing() -> None:
    assert flat(estimate(batch(1.0, 0.0), Baseline(9, 9, 9), settings(advantage="batch")).values) == [0.5, -0.5]
    assert flat(estimate(batch(1.0, 0.0), Baseline(9, 9, 9), settings(advantage="raw")).values) == [1.0, 0.0]


def test_every_turn_of_a_merged_session_has_its_own_advantage() -> None:
    sample = random_sample(7, rewards=(1.0, -1.0, 0.0))
    found = estimate([sample], Baseline(), settings(advantage="raw"))
    assert found.values == ((1.0, -1.0, 0.0),)


def test_scale_divides_by_the_spread_and_a_spread_of_zero_does_not_divide_by_zero() -> None:
    found = estimate(batch(1.0, -1.0), Baseline(), settings(advantage="raw", advantage_scale="std", baseline_prior=0.0))
    assert flat(found.values) == pytest.approx([1.0, -1.0])
    same = estimate(batch(0.5, 0.5), Baseline(), settings(advantage="raw", advantage_scale="std", baseline_prior=0.0))
    assert all(math.isfinite(value) for value in flat(same.values))


def test_equal_rewards_are_silent_and_the_reason_names_them() -> None:
    samples = batch(0.0, 0.0, 0.0)
    assert estimate(samples, Baseline(), settings()).silent
    assert "3 samples with rewards 0 all have the advantage 0" in explain_silence(samples, "running")


def test_the_running_estimator_has_less_variance_than_raw_rewards_and_no_bias() -> None:
    # A bandit with p = 0.5 and score +-1: the true gradient of the mean reward is Cov(score, reward) = 0.2.
    chance, runs = random.Random(0), {"running": [], "raw": []}
    for name, estimates in runs.items():
        for _ in range(1500):
            scores = [chance.choice((-1.0, 1.0)) for _ in range(8)]
            samples = batch(*(0.7 + 0.2 * s for s in scores))
            values = flat(estimate(samples, Baseline(32.0, 0.7, 0.5), settings(advantage=name)).values)
            estimates.append(sum(v * s for v, s in zip(values, scores, strict=True)) / 8)
    mean = {name: sum(e) / len(e) for name, e in runs.items()}
    spread = {name: sum((x - mean[name]) ** 2 for x in e) / len(e) for name, e in runs.items()}
    assert mean["running"] == pytest.approx(0.2, abs=0.02)
    assert spread["running"] < spread["raw"] / 10


@pytest.mark.parametrize("values", [[[1.0]], [[1.0], [1.0, 2.0]], [[1.0], [math.nan]]])
def test_advantages_of_a_plugin_that_do_not_fit_are_refused(values: list[list[float]]) -> None:
    with pytest.raises(AdvantageError, match="compute_advantages gave"):
        given(values, batch(0.1, 0.2), Baseline(), settings())


def test_advantages_of_a_plugin_are_taken_as_they_are() -> None:
    assert given([[0.25], [-2.0]], batch(0.1, 0.2), Baseline(), settings()).values == ((0.25,), (-2.0,))
