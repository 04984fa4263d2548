"""One agent's adapter inside the engine: its weights, its optimiser, and both as named tensors.

The optimiser is made from the adapter's own tensors and nothing else, so the base model cannot move, and neither can
another agent's adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from metaclaw_trainer.errors import CheckpointRefusedError
from metaclaw_trainer.fused_lora import FusedLinear
from metaclaw_trainer.settings import TrainerSettings

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The shape of an adapter."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # sorted

    @classmethod
    def of(cls, settings: TrainerSettings) -> AdapterConfig:
        return cls(settings.rank, settings.alpha, tuple(sorted(settings.targets)))

    def to_peft(self, base_model: str) -> LoraConfig:
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha if self.alpha != int(self.alpha) else int(self.alpha),
            lora_dropout=0.0,  # the sampler has none, and its log-probs must be ours
            target_modules=sorted(self.targets),
            bias="none",
            task_type="CAUSAL_LM",
            base_model_name_or_path=base_model,
        )
        config._register_custom_module({nn.Linear: FusedLinear})
        return config

    def to_json(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "targets": list(self.targets)}


@dataclass(frozen=True, slots=True)
class OptimiserOptions:
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101) and what is done to the gradient before it."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0

    @classmethod
    def of(cls, settings: TrainerSettings, step: int) -> OptimiserOptions:
        """``step``: steps taken so far; the step size rises linearly over ``warmup_steps``."""
        warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        return cls(
            learning_rate=settings.learning_rate * warm,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            grad_clip=settings.grad_clip,
        )


@dataclass(frozen=True, slots=True)
class AdapterState:
    """An adapter outside the model, on the CPU: all that training goes on from."""

    config: AdapterConfig
    weights: Mapping[str, Tensor]  # PEFT's names, without the adapter's
    moments: Mapping[str, Tensor]  # "exp_avg.<name>" and "exp_avg_sq.<name>"; empty before the first step
    step: int  # optimiser steps


@dataclass(slots=True)
class Slot:
    """Room for one adapter of a certain shape inside the model's layers; empty, it takes no memory."""

    name: str  # PEFT's name of the adapter
    config: AdapterConfig
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    weights: tuple[nn.Parameter, ...]  # in the order of ``names``
    optimiser: torch.optim.AdamW

    def clear(self) -> None:
        """Make it empty."""
        for weight in self.weights:
            weight.grad, weight.data = None, weight.data.new_empty(0)
            weight.requires_grad_(False)
        self.optimiser.state.clear()


@dataclass(slots=True)
class Adapter:
    """An adapter inside the model."""

    slot: Slot
    step: int = 0

    @property
    def config(self) -> AdapterConfig:
        return self.slot.config

    @property
    def names(self) -> tuple[str, ...]:
        return self.slot.names

    @property
    def weights(self) -> tuple[nn.Parameter, ...]:
        return self.slot.weights

    @property
    def optimiser(self) -> torch.optim.AdamW:
        return self.slot.optimiser

    def state(self) -> AdapterState:
        """A copy."""
        return self._taken(lambda tensor: tensor.detach().cpu().clone())

    def leave(self) -> AdapterState:
        """Give up the slot; on a CPU nothing is copied."""
        state = self._taken(lambda tensor: tensor.detach().cpu())
        self.slot.clear()
        return state

    def _taken(self, take: Callable[[Tensor], Tensor]) -> AdapterState:
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name, weight in zip(self.names, self.weights, strict=True):
            weights[name] = take(weight.data)
            kept = self.optimiser.state.get(weight, {})
            moments.update({f"{moment}.{name}": take(kept[moment]) for moment in MOMENTS if moment in kept})
        return AdapterState(self.config, weights, moments, self.step)

    def load(self, state: AdapterState) -> Adapter:
        """Take over a copy of weights and optimiser of ``state``; checked whole before anything is changed.

        Raises:
            CheckpointRefusedError: if a tensor is missing, unknown, or of another shape.
        """
        expected = dict(zip(self.names, map(tuple, self.slot.shapes), strict=True))
        _same_tensors("weights", expected, state.weights)
        if state.moments:
            shapes = {f"{moment}.{name}": shape for name, shape in expected.items() for moment in MOMENTS}
            _same_tensors("optimiser state", shapes, state.moments)
        elif state.step:
            raise CheckpointRefusedError(
                f"the adapter has taken {state.step} steps, but its optimiser state is missing"
            )
        return self._filled(state, lambda tensor, weight: tensor.to(weight.device, weight.dtype, copy=True))

    def enter(self, state: AdapterState) -> Adapter:
        """Take over what ``leave`` gave; on a CPU nothing is copied, so ``state`` must not be used any more."""
        return self._filled(state, lambda tensor, weight: tensor.to(weight.device, weight.dtype))

    def _filled(self, state: AdapterState, put: Callable[[Tensor, Tensor], Tensor]) -> Adapter:
        self.optimiser.state.clear()
        for name, weight in zip(self.names, self.weights, strict=True):
            weight.data = put(state.weights[name], weight)
            weight.requires_grad_(True)
            if state.moments:
                self.optimiser.state[weight] = {
                    "step": torch.tensor(float(state.step)),
                    **{moment: put(state.moments[f"{moment}.{name}"], weight) for moment in MOMENTS},
                }
        self.step = state.step
        return self

    @property
    def has_gradient(self) -> bool:
        return any(weight.grad is not None for weight in self.weights)

    def clear_gradient(self) -> None:
        for weight in self.weights:
            weight.grad = None

    def apply(self, options: OptimiserOptions) -> float:
        """Clip, step, clear the gradient; returns the norm before clipping. If that is not finite, no step is taken."""
        norm = float(nn.utils.clip_grad_norm_(self.weights, options.grad_clip, foreach=True))
        if math.isfinite(norm):
            for group in self.optimiser.param_groups:
                group.update(
                    lr=options.learning_rate, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay
                )
            self.optimiser.step()
            self.step += 1
        self.clear_gradient()
        return norm


def _same_tensors(what: str, expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> None:
    if odd := sorted(expected.keys() ^ given.keys()):
        raise CheckpointRefusedError(
            f"{what}: {len(odd)} tensors are missing or unknown, such as {odd[0]}: other targets?"
        )
    for name, shape in expected.items():
        if tuple(given[name].shape) != shape:
            raise CheckpointRefusedError(
                f"{what}: {name} has the shape {tuple(given[name].shape)}, not {shape}: another rank or base model?"
            )
        if not bool(torch.isfinite(given[name]).all()):
            raise CheckpointRefusedError(f"{what}: {name} holds NaN or infinity")
