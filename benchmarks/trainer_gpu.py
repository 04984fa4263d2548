"""The trainer on a GPU: a model of Qwen3-8B's shape with random weights, bfloat16, rank 32, sequences of 512 to 8192.

    python -m benchmarks.trainer_gpu [--shape qwen3-8b|tiny] [--device cuda] [--rounds 3] [--peak-tflops N]

Sides: the fork's loop as benchmarks/trainer.py describes it; ours, as it is; ours with activations computed twice, with
packed passes and variable-length attention, and with the logits of all answers at once instead of in chunks. Batches:
one of each length, and one of mixed lengths. Shown: tokens per second, peak memory, and the share of the device's peak
that useful arithmetic takes: 4 FLOP per token and frozen weight of the layers (forward, and the gradient of the input;
weights have none), the same for the head at sampled positions alone, and causal attention's products. What is computed
twice counts once. The shape ``tiny`` runs on a CPU, to try the script.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from metaclaw_trainer import forward
from metaclaw_trainer.adapters import AdapterConfig, OptimiserOptions
from metaclaw_trainer.base_model import adopt
from metaclaw_trainer.batching import Datum
from metaclaw_trainer.lora_engine import LoraEngine
from metaclaw_trainer.losses import LossOptions
from metaclaw_trainer.settings import SEVEN_PROJECTIONS, TrainerSettings
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config

from benchmarks.packed_pass import NAME, PackedEngine

LENGTHS = (512, 1024, 2048, 4096, 8192)
RESPONSE, RANK, KEY = 0.3, 32, "bench"
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}  # dense bfloat16, makers' data sheets
SHAPES: dict[str, dict[str, int]] = {
    "qwen3-8b": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000,
    },
}  # fmt: skip


def model_of(shape: str, device: torch.device, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(**SHAPES[shape], tie_word_embeddings=False, max_position_embeddings=16384)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def datums(lengths: Sequence[int], vocabulary: int, tokens: int) -> list[Datum]:
    """Sequences whose lengths go round ``lengths``, together about ``tokens`` tokens."""
    found: list[Datum] = []
    while not found or sum(one.length for one in found) + lengths[len(found) % len(lengths)] <= tokens:
        length, seed = lengths[len(found) % len(lengths)], len(found)
        ids = torch.randint(0, vocabulary, (length + 1,), generator=torch.Generator().manual_seed(seed))
        at = torch.arange(length - int(length * RESPONSE), length)
        count = len(at)
        found.append(Datum(ids[:-1], at, ids[1:][at], torch.full((count,), -12.0), torch.linspace(-1, 1, count)))
    return found


def useful_flops(shape: str, batch: Sequence[Datum]) -> float:
    one = SHAPES[shape]
    hidden, heads, size = one["hidden_size"], one["num_attention_heads"], one["head_dim"]
    layer = hidden * size * (2 * heads + 2 * one["num_key_value_heads"]) + 3 * hidden * one["intermediate_size"]
    total = 0.0
    for datum in batch:
        attention = 2 * 2 * heads * size * datum.length**2 / 2  # two products, half of them masked, forward
        total += one["num_hidden_layers"] * (4 * layer * datum.length + 3 * attention)
        total += 4 * hidden * one["vocab_size"] * datum.predicted
    return total


def ours(
    model: Any, device: torch.device, dtype: torch.dtype, recompute: bool = False, packed: bool = False
) -> Callable[[Sequence[Datum]], None]:
    values = {"rank": RANK, "gradient_checkpointing": recompute, "micro_batch_tokens": 16384, "nice": 0}
    if packed:
        model.set_attn_implementation(NAME)
    base = adopt(model, "bench", device, dtype)
    engine = (PackedEngine if packed else LoraEngine)(TrainerSettings.model_validate(values), base)
    engine.create(KEY, AdapterConfig(RANK, 64.0, tuple(sorted(SEVEN_PROJECTIONS))))

    def step(batch: Sequence[Datum]) -> None:
        engine.forward_backward(KEY, batch, "importance_sampling", LossOptions())
        engine.optim_step(KEY, OptimiserOptions(1e-5))

    return step


def whole_logits(step: Callable[[Sequence[Datum]], None]) -> Callable[[Sequence[Datum]], None]:
    """The same step with one chunk for the output layer, its softmax kept."""

    def stepped(batch: Sequence[Datum]) -> None:
        kept, forward.KEEP_ROWS = forward.KEEP_ROWS, 2**31
        try:
            step(batch)
        finally:
            forward.KEEP_ROWS = kept

    return stepped


def reference(model: Any, device: torch.device) -> Callable[[Sequence[Datum]], None]:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = LoraConfig(r=RANK, lora_alpha=64, target_modules=list(SEVEN_PROJECTIONS), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.get_input_embeddings().weight.requires_grad_(True)
    adapted.train()
    trainable = [weight for weight in adapted.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=1e-5)

    def step(batch: Sequence[Datum]) -> None:
        for one in batch:
            logits = adapted(input_ids=one.input_ids_L[None].to(device), use_cache=False).logits[0].float()
            targets = torch.zeros(one.length, dtype=torch.int64)
            targets[one.predict_at_N] = one.targets_N
            now = torch.log_softmax(logits, -1).gather(-1, targets.to(device)[:, None])[:, 0]
            at = one.predict_at_N.to(device)
            ratio = torch.exp(now[at] - one.sampled_N.to(device))
            (-(ratio * one.advantages_N.to(device)).sum()).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def measure(step: Callable[[Sequence[Datum]], None], batch: Sequence[Datum], device: torch.device, rounds: int) -> Any:
    cuda = device.type == "cuda"
    try:
        step(batch)  # warm
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(rounds):
            began = time.perf_counter()
            step(batch)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    except (torch.OutOfMemoryError, MemoryError):
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return statistics.median(seconds), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen3-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16384, help="tokens of a batch")
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--peak-tflops", type=float, help="dense bfloat16 peak of the device")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/trainer_gpu.json"))
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is at hand; --shape tiny --device cpu tries the script without one")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = given.peak_tflops or next((value for key, value in PEAK_TFLOPS.items() if key in name), None)
    if peak is None and device.type == "cuda":
        parser.error(f"the peak of {name} is not known here: give --peak-tflops")
    sides: dict[str, Callable[[Any], Callable[[Sequence[Datum]], None]]] = {
        "reference": lambda model: reference(model, device),
        "ours": lambda model: ours(model, device, dtype),
        "ours, recomputed": lambda model: ours(model, device, dtype, recompute=True),
        "ours, packed": lambda model: ours(model, device, dtype, packed=True),
        "ours, packed and recomputed": lambda model: ours(model, device, dtype, recompute=True, packed=True),
        "ours, whole logits": lambda model: whole_logits(ours(model, device, dtype)),
    }
    rows = []
    for side, make in sides.items():
        step = make(model_of(given.shape, device, dtype))
        for lengths in [*([length] for length in given.lengths), given.lengths]:
            batch = datums(lengths, SHAPES[given.shape]["vocab_size"], given.tokens)
            found = measure(step, batch, device, given.rounds)
            shown = lengths[0] if len(lengths) == 1 else "mixed"
            row: dict[str, Any] = {"side": side, "length": shown, "sequences": len(batch), "device": name}
            if found is None:
                row["failed"] = "out of memory"
            else:
                seconds, memory = found
                flops = useful_flops(given.shape, batch) / seconds
                row |= {
                    "tokens_per_second": sum(one.length for one in batch) / seconds,
                    "tflops": flops / 1e12,
                    "utilisation": flops / 1e12 / peak if peak else None,
                    "peak_gib": memory if device.type == "cuda" else None,
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
        del step
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
