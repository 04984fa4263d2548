"""Advantages for live traffic, where each prompt is seen once. Pure functions; one value per turn of a sample.

``running`` (default): A = r - b. The baseline b of a turn is the mean of the agent's earlier rewards and of the *other*
rewards of the batch, shrunk to 0 while they are few:

    b_i = (n m + sum_{j != i} r_j) / (n + N - 1 + k)

with n and m the weight and mean of the remembered rewards (n at most ``baseline_memory``), N turns in the batch, and k
(``baseline_prior``) the weight of the prior mean 0. A baseline that does not depend on the turn's own tokens leaves the
gradient unbiased (Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
learning"); leaving the own reward out keeps it so inside a batch (Kool, van Hoof and Welling 2019, "Buy 4 REINFORCE
samples, get a baseline for free!"); a baseline carried from step to step in the place of a group is that of
single-stream policy optimisation (Xu and Ding 2025, arXiv:2509.13232). Departures from the latter: one baseline for an
agent, not one for a prompt, since no prompt returns; its memory has a fixed length, where theirs follows the KL; no
scaling by default.

``group``: turns with the same prompt are centred on their group's other rewards; one without peers as in ``running``.
``batch``: A = r - mean of the batch, the ancestor's. ``raw``: A = r.
``scale`` "std": divided by the spread of remembered and batch rewards, shrunk to 1 like the mean to 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from metaclaw_hooks.types import Sample

from metaclaw_trainer.errors import AdvantageError
from metaclaw_trainer.settings import TrainerSettings

Estimator = Literal["running", "group", "batch", "raw"]
NO_SIGNAL = 1e-6  # advantages below this are rounding


@dataclass(frozen=True, slots=True)
class Baseline:
    """What is remembered of an agent's rewards."""

    weight: float = 0.0  # in rewards
    mean: float = 0.0
    square: float = 0.0  # mean of squares

    def updated(self, rewards: Sequence[float], memory: float) -> Baseline:
        """With a batch added; older rewards fade so that the weight stays at ``memory`` or below."""
        kept = min(self.weight, max(memory - len(rewards), 0.0))
        total = kept + len(rewards)
        if total == 0:
            return self
        return Baseline(
            weight=min(total, memory),
            mean=(kept * self.mean + math.fsum(rewards)) / total,
            square=(kept * self.square + math.fsum(r * r for r in rewards)) / total,
        )

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Baseline:
        return cls(weight=float(data["weight"]), mean=float(data["mean"]), square=float(data["square"]))


@dataclass(frozen=True, slots=True)
class Advantages:
    """One value per turn, in the order of samples and turns, and what they were made from."""

    values: tuple[tuple[float, ...], ...]
    baseline: Baseline  # to remember when the step is committed
    metrics: Mapping[str, float]

    @property
    def silent(self) -> bool:
        """Nothing to learn from: every advantage is zero."""
        return all(abs(value) < NO_SIGNAL for turns in self.values for value in turns)


def estimate(samples: Sequence[Sample], baseline: Baseline, settings: TrainerSettings) -> Advantages:
    """Advantages of a batch by the configured estimator."""
    rewards = [turn.reward for sample in samples for turn in sample.turns]
    centres = _centres(samples, rewards, baseline, settings)
    scale = _spread(rewards, baseline, settings.baseline_prior) if settings.advantage_scale == "std" else 1.0
    flat = iter([(reward - centre) / scale for reward, centre in zip(rewards, centres, strict=True)])
    values = tuple(tuple(next(flat) for _ in sample.turns) for sample in samples)
    return _with_metrics(values, rewards, centres, baseline.updated(rewards, settings.baseline_memory))


def given(
    values: Sequence[Sequence[float]], samples: Sequence[Sample], baseline: Baseline, settings: TrainerSettings
) -> Advantages:
    """Advantages that a plugin computed.

    Raises:
        AdvantageError: if they are not one finite number for each turn of each sample.
    """
    if len(values) != len(samples):
        raise AdvantageError(
            f"compute_advantages gave {len(values)} lists for {len(samples)} samples; one each is needed"
        )
    for sample, turns in zip(samples, values, strict=True):
        if len(turns) != len(sample.turns) or not all(math.isfinite(value) for value in turns):
            raise AdvantageError(
                f"compute_advantages gave {list(turns)[:8]} for sample {sample.id} of {len(sample.turns)} turns; "
                "one finite number for each turn is needed"
            )
    rewards = [turn.reward for sample in samples for turn in sample.turns]
    flat = [float(value) for turns in values for value in turns]
    centres = [reward - value for reward, value in zip(rewards, flat, strict=True)]
    exact = tuple(tuple(float(value) for value in turns) for turns in values)
    return _with_metrics(exact, rewards, centres, baseline.updated(rewards, settings.baseline_memory))


def explain_silence(samples: Sequence[Sample], estimator: str) -> str:
    """One line that says why a batch has nothing to teach."""
    rewards = sorted({round(turn.reward, 6) for sample in samples for turn in sample.turns})
    seen = f"{rewards[0]:g}" if len(rewards) == 1 else f"{rewards[0]:g} to {rewards[-1]:g}"
    return (
        f"no signal: {len(samples)} samples with rewards {seen} all have the advantage 0 ({estimator} baseline); "
        "the batch was skipped. Rewards that never differ teach nothing: look at the reward hooks"
    )


def _centres(
    samples: Sequence[Sample], rewards: Sequence[float], baseline: Baseline, settings: TrainerSettings
) -> list[float]:
    if settings.advantage == "raw":
        return [0.0] * len(rewards)
    if settings.advantage == "batch":
        return [math.fsum(rewards) / len(rewards)] * len(rewards)
    total = math.fsum(rewards)
    weight = baseline.weight + len(rewards) - 1 + settings.baseline_prior
    known = baseline.weight * baseline.mean
    running = [(known + total - reward) / weight if weight > 0 else 0.0 for reward in rewards]
    if settings.advantage == "running":
        return running
    groups: dict[tuple[int, ...], list[int]] = {}
    prompts = [sample.token_ids[: turn.start] for sample in samples for turn in sample.turns]
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    for members in groups.values():
        if len(members) > 1:
            inside = math.fsum(rewards[i] for i in members)
            for i in members:
                running[i] = (inside - rewards[i]) / (len(members) - 1)
    return running


def _spread(rewards: Sequence[float], baseline: Baseline, prior: float) -> float:
    weight = baseline.weight + len(rewards)
    mean = (baseline.weight * baseline.mean + math.fsum(rewards)) / weight
    square = (baseline.weight * baseline.square + math.fsum(r * r for r in rewards)) / weight
    variance = max(square - mean * mean, 0.0)
    return math.sqrt((weight * variance + prior) / (weight + prior)) or 1.0


def _with_metrics(
    values: tuple[tuple[float, ...], ...], rewards: Sequence[float], centres: Sequence[float], after: Baseline
) -> Advantages:
    flat = [value for turns in values for value in turns]
    mean = math.fsum(flat) / len(flat)
    metrics = {
        "reward": math.fsum(rewards) / len(rewards),
        "baseline": math.fsum(centres) / len(centres),
        "advantage_spread": math.sqrt(math.fsum((value - mean) ** 2 for value in flat) / len(flat)),
    }
    return Advantages(values, after, metrics)
