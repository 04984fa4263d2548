"""The trainer against the fork's loop: speed, memory, exactness, merged sessions, many agents.

    python -m benchmarks.trainer [speed] [exact] [session] [agents] [--rounds N] [--json FILE]

The reference side is written from the description of the fork's loop: one datum at a time with a graph of its own,
gradient checkpointing, input embeddings trainable, log-softmax over all positions and the whole vocabulary. Each runs
in a process of its own, rounds alternate, and CPU seconds are those of the process, so a busy machine counts little.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from metaclaw_trainer.adapters import AdapterConfig, OptimiserOptions
from metaclaw_trainer.batching import Datum
from metaclaw_trainer.lora_engine import LoraEngine
from metaclaw_trainer.losses import LossOptions
from metaclaw_trainer.settings import SEVEN_PROJECTIONS, TrainerSettings
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from demo.models import model_path

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


def side(name: str, model: str, rounds: int) -> None:
    """One side of ``speed``: prints a JSON line for each round; waits for a line before each."""
    torch.set_num_threads(1)
    loop = Reference(model) if name == "reference" else Ours(model)
    datums = [datum(length, seed) for seed, length in enumerate(LENGTHS)]
    loop.forward_backward(datums[:1])
    loop.step()
    for _ in range(rounds):
        sys.stdin.readline()
        began = time.process_time()
        loop.forward_backward(datums)
        loop.step()
        print(json.dumps({"cpu": time.process_time() - began, "peak": peak_mib()}), flush=True)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def speed(model: str, rounds: int) -> dict[str, Any]:
    """Tokens per CPU second and peak memory of both sides, rounds alternating."""
    argv = [sys.executable, "-m", "benchmarks.trainer", "--model", model, "--rounds", str(rounds), "--side"]
    sides = {
        name: subprocess.Popen([*argv, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in ("reference", "ours")
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, process in sides.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            seen[name].append(json.loads(process.stdout.readline()))
    for process in sides.values():
        process.communicate()
    tokens = sum(length - 1 for length in LENGTHS)
    report: dict[str, Any] = {
        name: {
            "tokens_per_cpu_second": tokens / statistics.median(one["cpu"] for one in rows),
            "peak_mib": max(one["peak"] for one in rows),
        }
        for name, rows in seen.items()
    }
    pairs = zip(seen["reference"], seen["ours"], strict=True)
    report["speed_ratio"] = statistics.median(theirs["cpu"] / mine["cpu"] for theirs, mine in pairs)
    report["memory_ratio"] = report["ours"]["peak_mib"] / report["reference"]["peak_mib"]
    return report


def exact(model: str, _rounds: int) -> dict[str, Any]:
    """Relative distance (L2) of loss and gradients from float64 with PEFT's layers, whole logits, plain autograd."""
    datums = [datum(length, seed) for seed, length in enumerate(LENGTHS[:3])]
    ours = Ours(model)
    torch.manual_seed(1)
    state = ours.engine.state(KEY)
    for weight in state.weights.values():
        weight.add_(0.02 * torch.randn_like(weight))  # B is 0 at first, and the gradient of A with it
    ours.engine.restore(KEY, state)
    loss = ours.forward_backward(datums)
    adapter = ours.engine.shelf.hot[KEY]
    found = {name: weight.grad.double() for name, weight in zip(adapter.names, adapter.weights, strict=True)}
    reference = Reference(model, torch.float64, embeddings=False)
    named = {name.replace(".default.", "."): p for name, p in reference.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, weight in named.items():
            weight.data = state.weights[name].double()
    wanted_loss = reference_loss_f64(reference, datums)
    apart = sum(float((found[name] - p.grad).pow(2).sum()) for name, p in named.items() if p.grad is not None)
    size = sum(float(p.grad.pow(2).sum()) for p in named.values() if p.grad is not None)
    return {"loss": abs(loss - wanted_loss) / abs(wanted_loss), "gradient": (apart / size) ** 0.5}


def reference_loss_f64(reference: Reference, datums: Sequence[Datum]) -> float:
    total = 0.0
    for one in datums:
        logits = reference.model(input_ids=one.input_ids_L[None]).logits[0]
        logp = torch.log_softmax(logits, -1)[one.predict_at_N].gather(1, one.targets_N[:, None])[:, 0]
        loss = -(torch.exp(logp - one.sampled_N.double()) * one.advantages_N.double()).sum()
        loss.backward()
        total += float(loss.detach())
    return total


def session(model: str, rounds: int) -> dict[str, Any]:
    """CPU seconds of six turns as one merged sample, and as six samples each with its whole history."""
    ours = Ours(model)
    turn, answer = 90, 30
    ends = [turn * (i + 1) for i in range(6)]
    merged = [datum(ends[-1], 0, [(end - answer, end) for end in ends])]
    apart = [datum(end, 0, [(end - answer, end)]) for end in ends]
    ours.forward_backward(merged)
    found: dict[str, list[float]] = {"merged": [], "apart": []}
    for _ in range(rounds):
        for name, datums in (("merged", merged), ("apart", apart)):
            began = time.process_time()
            ours.forward_backward(datums)
            found[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in found.items()}
    return {**medians, "ratio": medians["apart"] / medians["merged"]}


def agents(model: str, _rounds: int, count: int = 50) -> dict[str, Any]:
    """Resident memory of many agents on one base, each after a step, and what it takes to switch."""
    ours = Ours(model)
    engine, small = ours.engine, [datum(24, 1)]
    config = AdapterConfig(16, 32.0, tuple(sorted(SEVEN_PROJECTIONS)))
    ours.forward_backward(small)
    ours.step()
    before = resident_mib()
    for number in range(count):
        engine.create(f"agent-{number}", config)
        engine.forward_backward(f"agent-{number}", small, "cross_entropy", OPTIONS)
        engine.optim_step(f"agent-{number}", OptimiserOptions(1e-4))
    grown = resident_mib() - before
    parameters = sum(weight.numel() for weight in engine.state("agent-0").weights.values())
    expected = count * parameters * 4 * 3 / 2**20  # float32: weights and two moments
    switches = []
    for number in random.Random(0).choices(range(count), k=200):
        began = time.perf_counter()
        engine.page_in(f"agent-{number}")
        engine.shelf.activate(f"agent-{number}")
        switches.append((time.perf_counter() - began) * 1000)
    engine.page_out("agent-7")
    began = time.perf_counter()
    engine.page_in("agent-7")
    return {
        "agents": count,
        "grown_mib": grown,
        "adapters_and_moments_mib": expected,
        "switch_ms_median": statistics.median(switches),
        "switch_ms_max": max(switches),
        "page_in_ms": (time.perf_counter() - began) * 1000,
    }


def resident_mib() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / 2**20


PARTS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "speed": speed,
    "exact": exact,
    "session": session,
    "agents": agents,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--model", default=None, help="folder of the base model (default: SmolLM2-135M)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/trainer.json"))
    parser.add_argument("--side", choices=["reference", "ours"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    model = given.model or str(model_path("smollm2-135m"))
    if given.side:
        side(given.side, model, given.rounds)
        return
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    report = {}
    for part in given.parts or PARTS:
        report[part] = PARTS[part](model, given.rounds)
        print(part, json.dumps(report[part], indent=1), flush=True)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
