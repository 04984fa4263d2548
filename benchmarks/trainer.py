"""The trainer against the fork's loop: speed, memory, exactness, merged sessions, many agents.

    python -m benchmarks.trainer [speed] [exact] [session] [agents] [--rounds N] [--json FILE]

Both sides (benchmarks/trainer_sides.py) run in a process of their own and take turns at every datum; CPU seconds are
those of the process, so that a busy machine counts little.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from metaclaw_trainer.adapters import AdapterConfig, OptimiserOptions
from metaclaw_trainer.batching import Datum
from metaclaw_trainer.freed_memory import give_back
from metaclaw_trainer.lora_engine import LoraEngine
from metaclaw_trainer.settings import SEVEN_PROJECTIONS

from benchmarks.trainer_sides import KEY, LENGTHS, OPTIONS, Ours, Reference, Side, datum
from demo.models import model_path


def speed(model: str, rounds: int) -> dict[str, Any]:
    """Tokens per CPU second and peak memory of both sides, who take turns at every datum."""
    sides = {name: Side(name, model) for name in ("reference", "ours")}
    work = [*map(str, range(len(LENGTHS))), "step"]
    seen: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        spent = dict.fromkeys(sides, 0.0)
        for what in work:
            for name, one in sides.items():
                spent[name] += one.do(what)
        for name, seconds in spent.items():
            seen[name].append(seconds)
    tokens = sum(length - 1 for length in LENGTHS)
    report: dict[str, Any] = {
        name: {
            "cpu_seconds": seen[name],
            "tokens_per_cpu_second": tokens / statistics.median(seen[name]),
            "peak_mib": one.peak,
        }
        for name, one in sides.items()
    }
    for one in sides.values():
        one.close()
    pairs = zip(seen["reference"], seen["ours"], strict=True)
    report["speed_ratio"] = statistics.median(theirs / mine for theirs, mine in pairs)
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
    """Resident memory of many agents on one base, each after a step, and what it takes to switch.

    A switch makes another agent's adapter the one that the model uses. ``paged`` is the same with room for ten in the
    model, so that nearly every switch moves one out and one in; ``sum`` is what a batch of 256 tokens or more spends
    once besides, on adding the adapter to a copy of the weights.
    """
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
    order = random.Random(0).choices(range(count), k=200)
    hot = [_switch(engine, number) for number in order]
    sums = [_milliseconds(lambda n=number: _add_up(engine, n)) for number in order[:10]]  # type: ignore[misc]
    engine.shelf.free_memory()
    engine.shelf._max_hot = 10
    engine.create("one-more", config)
    paged = [_switch(engine, number) for number in order]
    return {
        "agents": count,
        "grown_mib": grown,
        "adapters_and_moments_mib": count * parameters * 4 * 3 / 2**20,  # float32: weights and two moments
        "switch_ms": {"median": statistics.median(hot), "max": max(hot)},
        "paged_switch_ms": {"median": statistics.median(paged), "max": max(paged)},
        "sum_ms": {"median": statistics.median(sums), "max": max(sums)},
    }


def _switch(engine: LoraEngine, number: int) -> float:
    def switch() -> None:
        engine.page_in(f"agent-{number}")
        engine.shelf.activate(f"agent-{number}")

    return _milliseconds(switch)


def _add_up(engine: LoraEngine, number: int) -> None:
    engine.shelf.moved()
    with engine.shelf.using(f"agent-{number}", 10_000):
        pass


def _milliseconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def resident_mib() -> float:
    """Of this process, without what it has freed."""
    import psutil

    give_back()
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
    given = parser.parse_args()
    model = given.model or str(model_path("smollm2-135m"))
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
