"""What a round of benchmarks/trainer.py would take if it were matrix products and attention alone, on both sides.

    python -m benchmarks.trainer_floor [--json FILE]

Every product of one layer of SmolLM2-135M, of its adapters (rank 16) and of its head is timed by itself at every length
of the round, one thread, float32, the least of five runs, and multiplied with how often a side computes it; attention
the same with torch's own kernel. The rest of a round is norms, rotary embedding, activation, softmax and the like. CPU
seconds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from metaclaw_trainer.freed_memory import keep_freed_memory
from torch import Tensor
from torch.nn import functional as F

from benchmarks.trainer_projections import HIDDEN, RANK, SHAPES, least
from benchmarks.trainer_sides import LENGTHS, RESPONSE

RUNS = 5
LAYERS, VOCABULARY, HEADS, KEY_HEADS, HEAD_SIZE = 30, 49152, 9, 3, 64


def product(rows: int, inner: int, columns: int) -> float:
    a, b = torch.randn(rows, inner), torch.randn(columns, inner)
    return least(lambda: F.linear(a, b), RUNS)


def attention(tokens: int) -> tuple[float, float]:
    """Forward, and forward with backward."""
    shape = [torch.randn(1, heads, tokens, HEAD_SIZE, requires_grad=True) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    along = torch.randn(1, HEADS, tokens, HEAD_SIZE)

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(*shape, is_causal=True, enable_gqa=True)

    with torch.no_grad():
        alone = least(forward, RUNS)
    return alone, least(lambda: forward().backward(along), RUNS)  # type: ignore[no-untyped-call]


def seconds_of(tokens: int) -> dict[str, dict[str, float]]:
    """One sequence on both sides, by what is computed."""
    there = sum(product(tokens, into, out) for out, into in SHAPES)
    back = sum(product(tokens, out, into) for out, into in SHAPES)
    thin_there = sum(product(tokens, into, RANK) + product(tokens, RANK, out) for out, into in SHAPES)
    thin_back = sum(
        product(tokens, into, RANK)
        + product(out, tokens, RANK)
        + product(tokens, out, RANK)
        + product(RANK, tokens, into)
        for out, into in SHAPES
    )
    forward, both = attention(tokens)
    sampled = int((tokens + 1) * RESPONSE)
    head = [(product(n, HIDDEN, VOCABULARY), product(n, VOCABULARY, HIDDEN)) for n in (tokens, sampled)]
    weights = product(VOCABULARY, tokens, HIDDEN)  # gradient of the embeddings, which are the head's too
    return {
        "reference": {  # forward twice: activations are computed again
            "layers": LAYERS * (2 * there + back),
            "adapters": LAYERS * (2 * thin_there + thin_back),
            "head": sum(head[0]) + weights,
            "attention": LAYERS * (forward + both),
        },
        "ours": {  # adapters are part of the sum in the forward pass
            "layers": LAYERS * (there + back),
            "adapters": LAYERS * thin_back,
            "head": sum(head[1]),
            "attention": LAYERS * both,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/trainer_floor.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_freed_memory()
    total: dict[str, dict[str, float]] = {}
    for length in LENGTHS:
        for side, parts in seconds_of(length - 1).items():
            have = total.setdefault(side, dict.fromkeys(parts, 0.0))
            total[side] = {part: have[part] + seconds for part, seconds in parts.items()}
    report = {side: {**parts, "together": sum(parts.values())} for side, parts in total.items()}
    print(json.dumps(report, indent=1))
    print("ratio", report["reference"]["together"] / report["ours"]["together"])
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
