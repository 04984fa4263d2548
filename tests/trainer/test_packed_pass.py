"""The packed passes of the GPU benchmark compute what the trainer's own padded passes do."""

from __future__ import annotations

from pathlib import Path

import torch
from metaclaw_trainer.base_model import load_base
from metaclaw_trainer.batching import datum_of
from metaclaw_trainer.lora_engine import LoraEngine

from benchmarks.packed_pass import NAME, PackedEngine
from tests.trainer.engine_parts import random_sample, tiny_settings


def test_packed_sequences_have_the_gradient_of_padded_ones(tiny_model: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_model, tmp_path, padding_limit=1000, micro_batch_tokens=1000)
    datums = [datum_of(random_sample(n, (1.0 - n,), prompt=3 + 9 * n, response=4 + n), [1.0 - n]) for n in range(4)]
    padded, packed = LoraEngine(settings), PackedEngine(settings, load_base(settings))
    packed.base.model.set_attn_implementation(NAME)
    losses, gradients = [], []
    for engine in (padded, packed):
        engine.create("ada", seed=3)
        losses.append(engine.forward_backward("ada", datums, "ppo").loss)
        weights = engine.shelf.get("ada").weights
        gradients.append(torch.cat([w.grad.flatten() for w in weights if w.grad is not None]))
    assert abs(losses[0] - losses[1]) < 1e-5 * abs(losses[0])
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-5
