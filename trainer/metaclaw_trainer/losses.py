"""Losses, as pure functions with one signature, and the table of their names.

With r = exp(now - sampled) for each sampled token, and A its advantage (definitions: Tinker's documentation of losses,
November 2026; ppo: Schulman et al. 2017, arXiv:1707.06347; cispo: MiniMax-M1, arXiv:2506.13585):

    importance_sampling   - r A                      r capped at ``importance_cap`` (truncated weights:
                                                     Ionides 2008; Espeholt et al. 2018, arXiv:1802.01561)
    ppo                   - min(r A, clip(r, low, high) A)
    cispo                 - stopgrad(clip(r, low, high)) A now
    cross_entropy         - A now                    A is then the weight of a token; ``sampled`` is not used

The loss of a batch is the **sum** of these terms over all sampled tokens, divided by what ``normalisation`` says; see
``token_weights``. Below, a suffix ``_N`` stands for one value per sampled token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from metaclaw_trainer.errors import UnknownLossError
from metaclaw_trainer.settings import TrainerSettings

Normalisation = Literal["token", "sequence", "constant"]

_MAX_LOG_RATIO = 60.0  # e^60 is still far from float32's largest number, and from any ratio that means something


@dataclass(frozen=True, slots=True)
class LossOptions:
    """Thresholds of the losses, and what their sum is divided by."""

    ppo_clip: tuple[float, float] = (0.8, 1.2)
    cispo_clip: tuple[float, float] = (0.0, 4.0)
    importance_cap: float = math.inf
    normalisation: Normalisation = "constant"
    normalisation_constant: float = 1.0

    @classmethod
    def of(cls, settings: TrainerSettings) -> LossOptions:
        return cls(
            ppo_clip=settings.ppo_clip,
            cispo_clip=settings.cispo_clip,
            importance_cap=settings.importance_cap,
            normalisation=settings.normalisation,
            normalisation_constant=settings.normalisation_constant,
        )


class LossTerms(NamedTuple):
    """What a loss returns."""

    loss_N: Tensor  # differentiable in ``now_N``
    clipped_N: Tensor  # bool: this token's gradient is bounded or zero because of a threshold


Loss = Callable[[Tensor, Tensor, Tensor, LossOptions], LossTerms]  # (now_N, sampled_N, advantages_N, options)


def importance_sampling(now_N: Tensor, sampled_N: Tensor, advantages_N: Tensor, options: LossOptions) -> LossTerms:
    """- r A, with r capped."""
    ratio_N = _ratio(now_N.detach(), sampled_N)
    weight_N = ratio_N.clamp(max=options.importance_cap)
    # exp(now - stopgrad(now)) is 1 and carries the gradient: value and gradient are those of r while r is below the cap
    loss_N = -weight_N * advantages_N * torch.exp(now_N - now_N.detach())
    return LossTerms(loss_N, ratio_N > options.importance_cap)


def ppo(now_N: Tensor, sampled_N: Tensor, advantages_N: Tensor, options: LossOptions) -> LossTerms:
    """- min(r A, clip(r) A)."""
    ratio_N = _ratio(now_N, sampled_N)
    free_N, bound_N = ratio_N * advantages_N, ratio_N.clamp(*options.ppo_clip) * advantages_N
    return LossTerms(-torch.minimum(free_N, bound_N), (bound_N < free_N).detach())


def cispo(now_N: Tensor, sampled_N: Tensor, advantages_N: Tensor, options: LossOptions) -> LossTerms:
    """- stopgrad(clip(r)) A now: a clipped token still has a gradient, unlike in ppo."""
    ratio_N = _ratio(now_N.detach(), sampled_N)
    weight_N = ratio_N.clamp(*options.cispo_clip)
    return LossTerms(-weight_N * advantages_N * now_N, weight_N != ratio_N)


def cross_entropy(now_N: Tensor, sampled_N: Tensor, advantages_N: Tensor, options: LossOptions) -> LossTerms:  # noqa: ARG001 - one signature
    """- A now, with the weight of a token in the place of its advantage."""
    return LossTerms(-advantages_N * now_N, torch.zeros_like(now_N, dtype=torch.bool))


BUILT_IN: Mapping[str, Loss] = MappingProxyType(
    {
        "importance_sampling": importance_sampling,
        "ppo": ppo,
        "cispo": cispo,
        "cross_entropy": cross_entropy,
    }
)


def find_loss(name: str, table: Mapping[str, Loss] = BUILT_IN) -> Loss:
    """The loss of that name.

    Raises:
        UnknownLossError: if there is none.
    """
    if name not in table:
        raise UnknownLossError(f"unknown loss {name[:80]!r}; known here: {', '.join(sorted(table))}")
    return table[name]


def token_weights(lengths: Sequence[int], options: LossOptions) -> list[float]:
    """What each sequence's token terms are multiplied with before the sum; ``lengths``: sampled tokens of each.

    ``token``: every token of the batch counts alike (1 / all tokens). ``sequence``: every sequence counts alike, the
    tokens of a long one less (1 / (sequences * own tokens)), as in GRPO (arXiv:2402.03300). ``constant``: the plain sum
    over a constant, as in Dr. GRPO (arXiv:2503.20783); with the constant 1 it is Tinker's sum.
    """
    if options.normalisation == "token":
        return [1.0 / sum(lengths)] * len(lengths)
    if options.normalisation == "sequence":
        return [1.0 / (len(lengths) * length) for length in lengths]
    return [1.0 / options.normalisation_constant] * len(lengths)


def _ratio(now_N: Tensor, sampled_N: Tensor) -> Tensor:
    return torch.exp((now_N - sampled_N).clamp(max=_MAX_LOG_RATIO))
