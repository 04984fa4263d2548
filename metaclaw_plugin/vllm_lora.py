"""Adapters in vLLM on machines without a GPU: vLLM's layers, with operations that look at each adapter once.

vLLM's own operations (0.32, ``lora/ops/torch_ops``) copy the weights of its adapter for every token of a batch. These
gather a batch's tokens by adapter instead, once a step, and multiply each adapter by its tokens. Tokens of the base
model belong to no adapter, so nothing is added to them; vLLM's operations add whatever lies in the last slot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows = slice | Tensor  # of a batch: a run of them, or their numbers


class GroupedLora(PunicaWrapperCPU):  # type: ignore[misc]
    """vLLM's bookkeeping of a batch's adapters, and what it adds to the output of adapted layers.

    Shapes: T tokens, D inputs, O outputs, R the largest rank, S slots for adapters. Weights are ``w_S1RD`` on the way
    down and ``w_S1OR`` on the way up.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._groups: list[tuple[int, Rows]] = []

    def update_metadata(self, *args: Any, **named: Any) -> None:
        """Take over which adapter each token of the next step belongs to."""
        super().update_metadata(*args, **named)
        self._groups = group_rows(self.token_lora_indices)

    def _apply_shrink(self, y: Tensor, x: Tensor, w_t_all: Tensor, scale: float) -> None:
        """Write ``x @ A.T * scale`` to ``y``, the rows of each adapter by its own A; ``y`` comes as zeros."""
        y = y.view(-1, y.shape[-1])
        for slot, rows in self._groups:
            down = w_t_all[slot].view(-1, w_t_all.shape[-1]).to(y.dtype)
            y[rows] = torch.mm(x[rows].to(y.dtype), down.T).mul_(scale)

    def _apply_expand(
        self, y: Tensor, x: Tensor, w_t_all: Tensor, y_offset: int, y_slice_size: int, add_inputs: bool = True
    ) -> None:
        """Add ``x @ B.T`` to ``y_slice_size`` columns of ``y``, or put it there if ``add_inputs`` is False."""
        columns = y.view(-1, y.shape[-1])[:, y_offset : y_offset + y_slice_size]
        for slot, rows in self._groups:
            up = w_t_all[slot].view(-1, w_t_all.shape[-1]).to(y.dtype)[:y_slice_size]
            added = torch.mm(x[rows].to(y.dtype), up.T)
            if not add_inputs:
                columns[rows] = added
            elif isinstance(rows, slice):
                columns[rows].add_(added)
            else:
                columns.index_add_(0, rows, added)

    def _expand_prefill(self, y: Tensor, x: Tensor, w_t_all: Tensor, add_inputs: bool) -> None:
        self._apply_expand(y, x, w_t_all, 0, min(y.shape[-1], w_t_all.shape[-2]), add_inputs)

    _expand_decode = _expand_prefill


def group_rows(slots: Tensor) -> list[tuple[int, Rows]]:
    """Each adapter's slot and its rows; ``slots`` has one for each token, -1 for the base model's, in no group."""
    groups: list[tuple[int, Rows]] = []
    for slot in torch.unique(slots).tolist():
        if slot < 0:
            continue
        rows = (slots == slot).nonzero().squeeze(1)
        first, last = int(rows[0]), int(rows[-1])
        groups.append((slot, slice(first, last + 1) if last - first + 1 == len(rows) else rows))
    return groups
