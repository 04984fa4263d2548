"""One training step of one agent, from samples to moved weights, in plain words:

set aside what is too old, does not fit the model, or was scored differently by sampler and trainer
advantages of what is left; without any, stop: nothing is ever "trained" on zeros
hold every token to the base model: A - k (logprob now - logprob under the base)
for each pass and each minibatch: gradient of the loss, clip, AdamW
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from metaclaw_hooks.types import BASE_VERSION, Sample
from torch import Tensor

from metaclaw_trainer.adapters import OptimiserOptions
from metaclaw_trainer.advantages import Advantages, Baseline, estimate, explain_silence
from metaclaw_trainer.batching import Datum, Pull, check_datum, datum_of, staleness
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.errors import InvalidDatumError
from metaclaw_trainer.losses import LossOptions
from metaclaw_trainer.settings import TrainerSettings

Advise = Callable[[Sequence[Sample], Baseline], Advantages | None]  # a plugin's advantages, or None
Teach = Callable[[str, Sequence[Sample]], Sequence[Sequence[Pull]]]  # further pulls of each sample under an adapter


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What an agent's training goes on from, besides weights and optimiser."""

    step: int = 0  # optimiser steps
    samples: int = 0  # trained on so far
    baseline: Baseline = field(default_factory=Baseline)
    random: tuple[Any, ...] = ()  # state of the generator that orders samples

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples": self.samples,
            "baseline": self.baseline.to_json(),
            "random": self.random,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainingState:
        version, values, gauss = data["random"]
        return cls(
            step=int(data["step"]),
            samples=int(data["samples"]),
            baseline=Baseline.from_json(data["baseline"]),
            random=(version, tuple(values), gauss),
        )

    @classmethod
    def fresh(cls, seed: int, agent: str) -> TrainingState:
        return cls(random=random.Random(f"{seed}/{agent}").getstate())


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of a batch."""

    state: TrainingState  # after it; the one before if nothing was trained
    trained: tuple[Sample, ...]
    aside: tuple[tuple[str, str], ...]  # sample id, reason
    silent: str | None  # why nothing was trained although there were samples
    metrics: Mapping[str, float]


def train_step(
    engine: EngineThread,
    key: str,
    state: TrainingState,
    samples: Sequence[Sample],
    head: int,
    settings: TrainerSettings,
    advise: Advise | None = None,
    teach: Teach | None = None,
) -> StepResult:
    """Train the adapter ``key``, which holds the weights of version ``head``, on ``samples``.

    If it raises, the adapter may have moved: load it again.

    Raises:
        EngineError: whatever the engine raises.
        AdvantageError: if a plugin's advantages do not fit.
    """
    started = time.monotonic()
    fit, aside = _fitting(engine, samples, head, settings)
    plain = [datum_of(sample, [0.0] * len(sample.turns)) for sample in fit]
    base = engine.call(lambda e: e.logprobs(None, plain)) if plain else []
    fit, base, gap, distant = _agreeing(engine, key, fit, plain, base, head, settings.gap_threshold)
    aside += distant
    if not fit:
        return StepResult(state, (), tuple(aside), None, {})
    advantages = (advise(fit, state.baseline) if advise else None) or estimate(fit, state.baseline, settings)
    pulls = teach(key, fit) if teach else [()] * len(fit)
    if advantages.silent and not any(pulls):
        return StepResult(state, (), tuple(aside), explain_silence(fit, settings.advantage), advantages.metrics)
    datums = [
        datum_of(sample, values).pulled(Pull("base", settings.kl_coefficient, logprobs), *others)
        for sample, values, logprobs, others in zip(fit, advantages.values, base, pulls, strict=True)
    ]
    after, seen = _descend(engine, key, state, datums, settings)
    seconds = time.monotonic() - started
    metrics = {
        **advantages.metrics,
        **seen,
        **gap,
        "samples": float(len(fit)),
        "seconds": seconds,
        "tokens_per_second": sum(datum.length for datum in datums) / seconds,
    }
    after = replace(after, samples=state.samples + len(fit), baseline=advantages.baseline)
    return StepResult(after, tuple(fit), tuple(aside), None, metrics)


def _fitting(
    engine: EngineThread, samples: Sequence[Sample], head: int, settings: TrainerSettings
) -> tuple[list[Sample], list[tuple[str, str]]]:
    vocabulary = engine.call(lambda e: e.base.vocabulary)
    fit: list[Sample] = []
    aside: list[tuple[str, str]] = []
    for sample in samples:
        if (old := staleness(sample, head)) > settings.max_staleness:
            aside.append(
                (
                    sample.id,
                    f"stale: drawn by version {sample.adapter_version}, {old} from the head {head}; "
                    f"max_staleness is {settings.max_staleness}",
                )
            )
            continue
        try:
            check_datum(datum_of(sample, [0.0] * len(sample.turns)), vocabulary, settings.max_sample_tokens)
        except InvalidDatumError as error:
            aside.append((sample.id, str(error)))
            continue
        fit.append(sample)
    return fit, aside


def _agreeing(
    engine: EngineThread,
    key: str,
    samples: list[Sample],
    datums: list[Datum],
    base: list[Tensor],
    head: int,
    threshold: float,
) -> tuple[list[Sample], list[Tensor], dict[str, float], list[tuple[str, str]]]:
    """Leave out samples whose sampler and trainer disagree at the same version: wrong template, type or adapter."""
    own = [i for i, sample in enumerate(samples) if sample.adapter_version == head != BASE_VERSION]
    scored = (
        dict(zip(own, engine.call(lambda e: e.logprobs(key, [datums[i] for i in own])), strict=True)) if own else {}
    )
    keep, aside, total, tokens, worst = [], [], 0.0, 0, 0.0
    for i, sample in enumerate(samples):
        now_N = base[i] if sample.adapter_version == BASE_VERSION else scored.get(i)
        if now_N is not None:
            apart_N = (now_N - datums[i].sampled_N).abs()
            mean = float(apart_N.mean())
            total, tokens, worst = total + float(apart_N.sum()), tokens + len(apart_N), max(worst, mean)
            if mean > threshold:
                aside.append(
                    (
                        sample.id,
                        f"sampler and trainer disagree by {mean:.2f} nats a token at version "
                        f"{sample.adapter_version} (gap_threshold is {threshold:g}): another base model, "
                        "dtype, adapter or chat template on one side?",
                    )
                )
                continue
        keep.append(i)
    metrics = {"gap": total / tokens, "gap_worst": worst} if tokens else {}
    return [samples[i] for i in keep], [base[i] for i in keep], metrics, aside


def _descend(
    engine: EngineThread, key: str, state: TrainingState, datums: Sequence[Datum], settings: TrainerSettings
) -> tuple[TrainingState, dict[str, float]]:
    options = LossOptions.of(settings)
    order = random.Random()
    order.setstate(state.random)
    step, seen = state.step, []
    for _ in range(settings.epochs):
        indexes = list(range(len(datums)))
        if settings.minibatches > 1:
            order.shuffle(indexes)
        size = -(-len(indexes) // settings.minibatches)
        for start in range(0, len(indexes), size):
            chosen = [datums[i] for i in indexes[start : start + size]]
            result = engine.call(lambda e, d=chosen: e.forward_backward(key, d, settings.loss, options))  # type: ignore[misc]
            rate = OptimiserOptions.of(settings, step)
            moved = engine.call(lambda e, r=rate: e.optim_step(key, r))  # type: ignore[misc]
            step += 1
            seen.append({**result.metrics, "loss": result.loss, **moved})
    names = {name for one in seen for name in one} - {"step"}
    means = {name: sum(one[name] for one in seen) / len(seen) for name in sorted(names)}
    return replace(state, step=step, random=order.getstate()), means | {"optimiser_steps": float(len(seen))}
