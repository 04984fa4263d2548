"""AdamW as the settings say it, against the formulas of its paper (arXiv:1711.05101) written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from metaclaw_trainer.adapters import OptimiserOptions
from metaclaw_trainer.batching import datum_of
from metaclaw_trainer.lora_engine import LoraEngine
from torch import Tensor

from tests.trainer.engine_parts import random_sample, tiny_settings


def test_steps_are_adamw_with_clipping_and_decoupled_decay(tiny_model: Path, tmp_path: Path) -> None:
    engine = LoraEngine(tiny_settings(tiny_model, tmp_path))
    engine.create("ada", seed=1)
    adapter = engine.shelf.get("ada")
    options = OptimiserOptions(learning_rate=0.02, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1, grad_clip=0.5)
    (beta1, beta2), weights = options.betas, [w.detach().double() for w in adapter.weights]
    first, second = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    for step in (1, 2, 3):
        engine.forward_backward("ada", [datum_of(random_sample(step), [3.0])], "cross_entropy")
        gradients: list[Tensor] = [w.grad.double() for w in adapter.weights if w.grad is not None]
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        assert norm > options.grad_clip
        moved = engine.optim_step("ada", options)
        assert moved["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert moved["step"] == step
        for i, gradient in enumerate(gradients):
            clipped = gradient * options.grad_clip / norm
            first[i] = beta1 * first[i] + (1 - beta1) * clipped
            second[i] = beta2 * second[i] + (1 - beta2) * clipped**2
            mean, square = first[i] / (1 - beta1**step), second[i] / (1 - beta2**step)
            decayed = weights[i] * (1 - options.learning_rate * options.weight_decay)
            weights[i] = decayed - options.learning_rate * mean / (square.sqrt() + options.eps)
    for weight, wanted in zip(adapter.weights, weights, strict=True):
        assert torch.allclose(weight.detach().double(), wanted, atol=1e-5)


def test_the_step_size_rises_linearly_over_the_warm_up_and_stays(tiny_model: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_model, tmp_path, learning_rate=0.4, warmup_steps=4)
    rates = [OptimiserOptions.of(settings, step).learning_rate for step in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    flat = tiny_settings(tiny_model, tmp_path, learning_rate=0.4)
    assert OptimiserOptions.of(flat, 0).learning_rate == 0.4
