"""What the seven projections of one layer cost, forward and backward, with an adapter done in different ways.

    python -m benchmarks.trainer_projections [--tokens N ...] [--json FILE]

SmolLM2-135M's shapes, rank 16, float32, one thread; CPU milliseconds, the least of seven runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from metaclaw_trainer.fused_lora import _LoraProduct, _MergedProduct
from torch import Tensor, nn
from torch.nn import functional as F

HIDDEN, INNER, KEYS, RANK, SCALE = 576, 1536, 192, 16, 2.0
SHAPES = [(HIDDEN, HIDDEN), (KEYS, HIDDEN), (KEYS, HIDDEN), (HIDDEN, HIDDEN)]
SHAPES += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]


def ways(out: int, into: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name -> forward function."""
    weight = torch.randn(out, into) / 24
    a, b = nn.Parameter(torch.randn(RANK, into) / 24), nn.Parameter(torch.randn(out, RANK) / 24)
    added = (weight + SCALE * b @ a).detach()
    return {
        "no adapter": lambda x: F.linear(x, weight),
        "as in PEFT": lambda x: F.linear(x, weight) + F.linear(F.linear(x, a), b) * SCALE,
        "fused": lambda x: _LoraProduct.apply(x, weight, None, a, b, SCALE),  # type: ignore[no-any-return]
        "added up": lambda x: _MergedProduct.apply(x, added, None, a, b, SCALE),  # type: ignore[no-any-return]
    }


def least(work: Callable[[], object], runs: int = 7) -> float:
    """Processor seconds of the quickest of ``runs`` runs, after one that does not count."""
    work()
    seconds = []
    for _ in range(runs):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/trainer_projections.json"))
    parser.add_argument("--tokens", type=int, nargs="*", default=[128, 384, 768])
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for tokens in given.tokens:
        row: dict[str, float] = {"tokens": float(tokens)}
        for out, into in SHAPES:
            x, grad = torch.randn(tokens, into, requires_grad=True), torch.randn(tokens, out)
            for name, forward in ways(out, into).items():
                seconds = least(lambda x=x, f=forward, g=grad: f(x).backward(g))  # type: ignore[misc]
                row[name] = row.get(name, 0.0) + seconds * 1000
        rows.append(row)
        print(json.dumps(row), flush=True)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
