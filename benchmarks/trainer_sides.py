"""The two loops that benchmarks/trainer.py sets against each other, and the process that each of them runs in.

The reference is written from the description of the fork's loop: one datum at a time with a graph of its own, gradient
checkpointing, input embeddings trainable, log-softmax over all positions and the whole vocabulary.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from metaclaw_trainer.adapters import OptimiserOptions
from metaclaw_trainer.batching import Datum
from metaclaw_trainer.freed_memory import keep_freed_memory
from metaclaw_trainer.lora_engine import LoraEngine
from metaclaw_trainer.losses import LossOptions
from metaclaw_trainer.settings import SEVEN_PROJECTIONS, TrainerSettings
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

LENGTHS = (128, 219, 311, 402, 494, 585, 677, 768)
RESPONSE = 0.3  # share of a sequence that was sampled
KEY = "bench"
OPTIONS = LossOptions()  # the sum over tokens


def datum(length: int, seed: int, spans: Sequence[tuple[int, int]] | None = None) -> Datum:
    """Random token ids with ``spans`` of predicted tokens (default: the last 30 %)."""
    chance = random.Random(seed)
    tokens = torch.tensor([chance.randrange(49152) for _ in range(length)])
    first = length - int(length * RESPONSE)
    at = torch.tensor([i for start, end in (spans or [(first, length)]) for i in range(start, end)])
    count = len(at)
    return Datum(tokens[:-1], at - 1, tokens[at], torch.full((count,), -11.0), torch.linspace(-1.0, 1.0, count))


class Reference:
    """The fork's loop."""

    def __init__(self, model: str, dtype: torch.dtype = torch.float32, embeddings: bool = True) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        base.config.use_cache = False
        torch.manual_seed(0)
        config = LoraConfig(r=16, lora_alpha=32, target_modules=list(SEVEN_PROJECTIONS), task_type="CAUSAL_LM")
        self.model = get_peft_model(base, config)
        if embeddings:
            self.model.get_input_embeddings().weight.requires_grad_(True)
        self.model.train()
        self.optimiser = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def forward_backward(self, datums: Sequence[Datum]) -> float:
        total = 0.0
        for one in datums:
            logits = self.model(input_ids=one.input_ids_L[None]).logits[0].float()
            targets = torch.zeros(one.length, dtype=torch.int64)
            sampled, advantages, mask = (torch.zeros(one.length) for _ in range(3))
            targets[one.predict_at_N], mask[one.predict_at_N] = one.targets_N, 1.0
            sampled[one.predict_at_N], advantages[one.predict_at_N] = one.sampled_N, one.advantages_N
            now = torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None])[:, 0]
            loss = -(torch.exp(now - sampled) * advantages * mask).sum()
            loss.backward()
            total += float(loss.detach())
        return total

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad()


class Ours:
    """The engine of this trainer."""

    def __init__(self, model: str, **others: object) -> None:
        values: dict[str, Any] = {"base_model": model, "device": "cpu", "dtype": "float32", "nice": 0, **others}
        self.engine = LoraEngine(TrainerSettings.model_validate(values))
        self.engine.create(KEY)

    def forward_backward(self, datums: Sequence[Datum]) -> float:
        return self.engine.forward_backward(KEY, datums, "importance_sampling", OPTIONS).loss

    def step(self) -> None:
        self.engine.optim_step(KEY, OptimiserOptions(1e-4))


def side(name: str, model: str) -> None:
    """One side of ``speed`` in a process of its own: for each line on stdin, the number of a datum or "step", CPU
    seconds of that and the peak of memory."""
    torch.set_num_threads(1)
    if name == "ours":
        keep_freed_memory()  # as the trainer's process does
    loop = Reference(model) if name == "reference" else Ours(model)
    datums = [datum(length, seed) for seed, length in enumerate(LENGTHS)]
    loop.forward_backward(datums[:1])
    loop.step()
    for line in sys.stdin:
        began = time.process_time()
        if line.strip() == "step":
            loop.step()
        else:
            loop.forward_backward([datums[int(line)]])
        print(json.dumps({"cpu": time.process_time() - began, "peak": peak_mib()}), flush=True)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Side:
    """A side of ``speed``, in its process."""

    def __init__(self, name: str, model: str) -> None:
        argv = [sys.executable, "-m", "benchmarks.trainer_sides", name, model]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak = 0.0

    def do(self, what: str) -> float:
        """CPU seconds of the work ``what``: the number of a datum, or "step"."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        seen: dict[str, float] = json.loads(self._process.stdout.readline())
        self.peak = max(self.peak, seen["peak"])
        return seen["cpu"]

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["reference", "ours"])
    parser.add_argument("model", help="folder of the base model")
    given = parser.parse_args()
    side(given.name, given.model)


if __name__ == "__main__":
    main()
