"""vLLM's own LoRA operations for CPUs and those that we put in their place, on vLLM's own bookkeeping."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from metaclaw_plugin.vllm_repair import OURS, VLLMS, repair

pytestmark = pytest.mark.vllm

SLOTS, RANK, INTO = 3, 4, 8
SLICES = (6, 2, 4)  # the outputs of three fused projections


@pytest.fixture
def platform() -> Iterator[Any]:
    from vllm.platforms.cpu import CpuPlatform

    before = CpuPlatform.__dict__["get_punica_wrapper"]
    yield CpuPlatform
    CpuPlatform.get_punica_wrapper = before


def run(cls: Any, slots: list[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """The output of a fused layer for tokens of the adapters in ``slots``; without an adapter it would be ones."""
    torch.manual_seed(0)
    wrapper = cls(64, 64, "cpu")
    ids = {slot: slot + 1 for slot in range(SLOTS)}  # vLLM's number of the adapter in each slot
    mapping = SimpleNamespace(
        index_mapping=tuple(ids.get(slot, 0) for slot in slots),
        prompt_mapping=tuple(ids.get(slot, 0) for slot in slots),
        is_prefill=True,
    )
    wrapper.update_metadata(mapping, list(ids.values()), SLOTS, 32)
    x = torch.randn(len(slots), INTO, dtype=dtype)
    down = tuple(torch.randn(SLOTS, 1, RANK, INTO, dtype=dtype) for _ in SLICES)
    up = tuple(torch.randn(SLOTS, 1, width, RANK, dtype=dtype) for width in SLICES)
    y = torch.ones(len(slots), sum(SLICES), dtype=dtype)
    wrapper.add_lora_linear(y, x, down, up, 0.5, SLICES)
    return y


def classes() -> tuple[Any, Any]:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    from metaclaw_plugin.vllm_lora import GroupedLora

    return PunicaWrapperCPU, GroupedLora


@pytest.mark.parametrize("slots", [[0], [2, 2, 2], [0, 0, 1, 2, 2], [0, 2, 1, 2, 0, 0]])
def test_rows_of_adapters_get_what_vllms_own_operations_give_them(slots: list[int]) -> None:
    theirs, ours = classes()
    torch.testing.assert_close(run(ours, slots), run(theirs, slots))
    assert not torch.equal(run(ours, slots), torch.ones(len(slots), sum(SLICES)))


def test_rows_of_the_base_model_get_nothing_wherever_they_stand() -> None:
    theirs, ours = classes()
    mixed = run(ours, [0, -1, 1, -1, 2])
    assert torch.equal(mixed[[1, 3]], torch.ones(2, sum(SLICES)))
    torch.testing.assert_close(mixed[[0, 2, 4]], run(theirs, [0, -1, 1, -1, 2])[[0, 2, 4]])
    assert torch.equal(run(ours, [-1, -1]), torch.ones(2, sum(SLICES)))


def test_weights_of_half_the_width_are_multiplied_as_vllm_does() -> None:
    theirs, ours = classes()
    slots = [1, 0, 1]
    torch.testing.assert_close(run(ours, slots, torch.bfloat16), run(theirs, slots, torch.bfloat16))


def test_an_adapted_embedding_adds_to_its_own_rows_alone() -> None:
    _, ours = classes()
    wrapper = ours(64, 64, "cpu")
    mapping = SimpleNamespace(index_mapping=(1, 0, 2), prompt_mapping=(1, 0, 2), is_prefill=True)
    wrapper.update_metadata(mapping, [1, 2, 3], SLOTS, 32)
    x, y = torch.ones(3, RANK), torch.zeros(3, 5)
    up = torch.stack([torch.full((1, 5, RANK), float(slot + 1)) for slot in range(SLOTS)])
    wrapper.add_lora_embedding(y, x, up)
    assert y[:, 0].tolist() == [RANK, 0.0, 2.0 * RANK]


def test_the_repair_is_chosen_once_and_leaves_what_it_does_not_know(platform: Any) -> None:
    platform.get_punica_wrapper = classmethod(lambda _: VLLMS)
    repair()
    repair()
    assert platform.get_punica_wrapper() == OURS
    platform.get_punica_wrapper = classmethod(lambda _: "another.Wrapper")
    repair()
    assert platform.get_punica_wrapper() == "another.Wrapper"


def test_vllm_finds_the_repair_by_its_entry_point() -> None:
    [point] = [p for p in entry_points(group="vllm.general_plugins") if p.name == "metaclaw"]
    assert point.load() is repair
