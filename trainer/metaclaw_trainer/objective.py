"""From scored tokens to the number that is differentiated, and what was seen on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metaclaw_trainer.batching import Datum
from metaclaw_trainer.errors import EngineError, NonFiniteError
from metaclaw_trainer.forward import Scored
from metaclaw_trainer.losses import Loss, LossOptions, LossTerms


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What one call of ``forward_backward`` saw."""

    loss: float  # normalised as the options say
    tokens: int  # computed on, prompts included
    predicted: int  # with a log-probability
    logprobs: tuple[Tensor, ...]  # of each datum, [N], float32, on the CPU
    metrics: Mapping[str, float]  # means over predicted tokens


@dataclass(slots=True)
class Tally:
    """Sums over the predicted tokens of a batch, filled micro-batch by micro-batch."""

    datums: Sequence[Datum]
    loss: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    logprobs: dict[int, Tensor] = field(default_factory=dict)

    def add(self, **sums: Tensor) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def result(self) -> BatchResult:
        predicted = sum(datum.predicted for datum in self.datums)
        return BatchResult(
            loss=self.loss,
            tokens=sum(datum.length for datum in self.datums),
            predicted=predicted,
            logprobs=tuple(self.logprobs[index] for index in range(len(self.datums))),
            metrics={name: value / predicted for name, value in self.sums.items()},
        )


def objective(
    indexes: Sequence[int],
    scored: Sequence[Scored],
    weights: Sequence[float],
    loss: Loss,
    options: LossOptions,
    tally: Tally,
) -> Tensor:
    """The weighted sum of loss terms of the datums ``indexes``, as one differentiable scalar.

    The pulls of a datum (KL to the base model, teacher, hint) join its advantages here, where the current
    log-probabilities are known: A - coefficient (now - other), with no gradient through that term.

    Raises:
        NonFiniteError: if it is NaN or infinite.
    """
    parts = []
    for index, one in zip(indexes, scored, strict=True):
        datum, now_N = tally.datums[index], one.logprobs_N
        still_N = now_N.detach()
        sampled_N, advantages_N = datum.sampled_N.to(now_N.device), datum.advantages_N.to(now_N.device)
        for pull in datum.pulls:
            apart_N = still_N - pull.logprobs_N.to(now_N.device)
            advantages_N = advantages_N - pull.coefficient * apart_N
            tally.add(**{f"kl_{pull.name}": apart_N.sum()})
        terms = loss(now_N, sampled_N, advantages_N, options)
        if not isinstance(terms, LossTerms) or terms.loss_N.shape != now_N.shape or not terms.loss_N.requires_grad:
            raise EngineError(
                f"the loss gave no LossTerms with one differentiable value for each of {len(now_N)} tokens; "
                "see metaclaw_trainer.losses for the signature"
            )
        parts.append(terms.loss_N.sum() * weights[index])
        tally.logprobs[index] = still_N.cpu()
        tally.add(
            clip_fraction=terms.clipped_N.sum(),
            entropy=one.entropy_N.sum(),
            ratio=torch.exp(still_N - sampled_N).sum(),
        )
    total = torch.stack(parts).sum()
    value = float(total.detach())
    if not math.isfinite(value):
        raise NonFiniteError(f"the loss is {value}: nothing was learned from this batch")
    tally.loss += value
    return total
