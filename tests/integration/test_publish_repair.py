"""vLLM's own LoRA operations, with and without our repair: rows of the base model in a mixed batch."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from types import ModuleType

import pytest
import torch

from metaclaw_plugin.vllm_repair import repair

pytestmark = pytest.mark.vllm

SLOTS, RANK, WIDTH = 3, 2, 4


@pytest.fixture
def ops() -> Iterator[ModuleType]:
    from vllm.lora.ops.torch_ops import lora_ops

    before = lora_ops.bgmv_shrink
    yield lora_ops
    lora_ops.bgmv_shrink = before


def run(ops: ModuleType, slots: list[int]) -> torch.Tensor:
    """What the LoRA adds to each of ``len(slots)`` tokens; slot i multiplies by i + 1."""
    torch.manual_seed(0)
    inputs = torch.ones(len(slots), WIDTH)
    down = torch.stack([torch.full((RANK, WIDTH), float(i + 1)) for i in range(SLOTS)])
    up = torch.stack([torch.eye(WIDTH)[:, :RANK] for _ in range(SLOTS)])
    hidden, out = torch.full((len(slots), RANK), 7.0), torch.zeros(len(slots), WIDTH)
    index = torch.tensor(slots)
    one = torch.ones(len(slots), dtype=torch.long)
    starts = torch.arange(len(slots))
    ops.sgmv_shrink(inputs, down, hidden, starts, one, index, len(slots), 1, len(slots), 1.0)
    ops.sgmv_expand(hidden, up, out, starts, one, index, len(slots), 1, len(slots), add_inputs=True)
    return out[:, 0]


def test_rows_of_adapters_are_untouched_and_rows_of_the_base_model_get_nothing(ops: ModuleType) -> None:
    before = run(ops, [0, 2, 1, 2])
    repair()
    repair()
    assert torch.equal(run(ops, [0, 2, 1, 2]), before)
    assert run(ops, [0, -1, 1, -1]).tolist() == [4.0, 0.0, 8.0, 0.0]
    assert run(ops, [-1]).tolist() == [0.0]


def test_vllm_finds_the_repair_by_its_entry_point() -> None:
    [point] = [p for p in entry_points(group="vllm.general_plugins") if p.name == "metaclaw"]
    assert point.load() is repair
