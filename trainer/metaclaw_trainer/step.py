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
from metaclaw_trainer.agreement import Agreement, DisagreementError
from metaclaw_trainer.batching import Datum, Pull, check_datum, datum_of, staleness
from metaclaw_trainer.engine_thread import EngineThread
from metaclaw_trainer.errors import InvalidDatumError
from metaclaw_trainer.losses import LossOptions
from metaclaw_trainer.objective import BatchResult
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
    batch, distant = _scored(engine, key, fit, head, settings)
    while True:
        aside += distant.items()
        fit = [sample for sample in fit if sample.id not in distant]
        if not fit:
            return StepResult(state, (), tuple(aside), None, {})
        try:
            result = _learn(batch, state, fit, advise, teach)
            break
        except DisagreementError as error:
            distant = error.reasons
    metrics = dict(result.metrics)
    if result.trained:
        seconds, tokens = time.monotonic() - started, sum(batch.plain[sample.id].length for sample in fit)
        metrics |= {"samples": float(len(fit)), "seconds": seconds, "tokens_per_second": tokens / seconds}
    return replace(result, aside=tuple(aside), metrics=metrics | batch.agreement.metrics())


@dataclass(frozen=True, slots=True)
class _Batch:
    """What is known of a batch before anything is learned from it; by sample id."""

    engine: EngineThread
    key: str
    settings: TrainerSettings
    plain: dict[str, Datum]  # without advantages
    base: dict[str, Tensor]  # log-probs under the base model
    agreement: Agreement
    unchecked: frozenset[str]  # drawn by the head, whose log-probs the first gradient brings along


def _scored(
    engine: EngineThread, key: str, samples: Sequence[Sample], head: int, settings: TrainerSettings
) -> tuple[_Batch, dict[str, str]]:
    """The batch, and those samples of it (id -> reason) on which sampler and trainer are seen to disagree already."""
    plain = {sample.id: datum_of(sample, [0.0] * len(sample.turns)) for sample in samples}
    base = _score(engine, None, samples, plain)
    known = {sample.id: base[sample.id] for sample in samples if sample.adapter_version == BASE_VERSION}
    own = [sample for sample in samples if sample.adapter_version == head != BASE_VERSION]
    if settings.epochs * settings.minibatches > 1:  # else the one pass that is differentiated tells as well
        known |= _score(engine, key, own, plain)
        own = []
    agreement, unchecked = Agreement(settings.gap_threshold), frozenset(sample.id for sample in own)
    distant = _distant(agreement, [sample for sample in samples if sample.id in known], plain, known)
    return _Batch(engine, key, settings, plain, base, agreement, unchecked), distant


def _learn(
    batch: _Batch, state: TrainingState, samples: Sequence[Sample], advise: Advise | None, teach: Teach | None
) -> StepResult:
    """Advantages, pulls, optimiser steps.

    Raises:
        DisagreementError: if samples turn out not to agree; nothing has moved then.
    """
    settings = batch.settings
    advantages = (advise(samples, state.baseline) if advise else None) or estimate(samples, state.baseline, settings)
    pulls = teach(batch.key, samples) if teach else [()] * len(samples)
    if advantages.silent and not any(pulls):
        return StepResult(state, (), (), explain_silence(samples, settings.advantage), advantages.metrics)
    datums = [
        datum_of(sample, values).pulled(Pull("base", settings.kl_coefficient, batch.base[sample.id]), *others)
        for sample, values, others in zip(samples, advantages.values, pulls, strict=True)
    ]
    unchecked = [sample for sample in samples if sample.id in batch.unchecked]

    def look(result: BatchResult) -> dict[str, str]:
        now = dict(zip((sample.id for sample in samples), result.logprobs, strict=True))
        return _distant(batch.agreement, unchecked, batch.plain, now)

    after, seen = _descend(batch.engine, batch.key, state, datums, settings, look if unchecked else None)
    after = replace(after, samples=state.samples + len(samples), baseline=advantages.baseline)
    return StepResult(after, tuple(samples), (), None, {**advantages.metrics, **seen})


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


def _score(
    engine: EngineThread, key: str | None, samples: Sequence[Sample], datums: Mapping[str, Datum]
) -> dict[str, Tensor]:
    """Log-probs by sample id under an adapter, or under the base model."""
    if not samples:
        return {}
    found = engine.call(lambda e: e.logprobs(key, [datums[sample.id] for sample in samples]))
    return {sample.id: logprobs for sample, logprobs in zip(samples, found, strict=True)}


def _distant(
    agreement: Agreement, samples: Sequence[Sample], datums: Mapping[str, Datum], now: Mapping[str, Tensor]
) -> dict[str, str]:
    """Sample id -> reason, of those that sampler and trainer scored differently."""
    reasons = {sample.id: agreement.check(sample, datums[sample.id], now[sample.id]) for sample in samples}
    return {identity: reason for identity, reason in reasons.items() if reason is not None}


def _descend(
    engine: EngineThread,
    key: str,
    state: TrainingState,
    datums: Sequence[Datum],
    settings: TrainerSettings,
    look: Callable[[BatchResult], dict[str, str]] | None,
) -> tuple[TrainingState, dict[str, float]]:
    """Take all optimiser steps of a batch; ``look`` may still refuse samples when the first gradient is there."""
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
            if look is not None and (reasons := look(result)):
                engine.call(lambda e: e.zero_grad(key))
                raise DisagreementError(reasons)
            rate = OptimiserOptions.of(settings, step)
            moved = engine.call(lambda e, r=rate: e.optim_step(key, r))  # type: ignore[misc]
            step += 1
            seen.append({**result.metrics, "loss": result.loss, **moved})
    names = {name for one in seen for name in one} - {"step"}
    means = {name: sum(one[name] for one in seen) / len(seen) for name in sorted(names)}
    return replace(state, step=step, random=order.getstate()), means | {"optimiser_steps": float(len(seen))}
