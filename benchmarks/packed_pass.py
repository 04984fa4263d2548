"""Several sequences in one pass without padding: one row of tokens, and attention that stays within each sequence.

On a GPU attention is torch's variable-length flash kernel; on a CPU one call for each sequence, to try it there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from metaclaw_trainer import forward
from metaclaw_trainer.batching import Datum
from metaclaw_trainer.forward import Scored
from metaclaw_trainer.lora_engine import LoraEngine
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "metaclaw_packed"


def packed_attention(
    _module: Any,
    query: Tensor,  # [1, heads, tokens, size]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,  # int32, where each sequence begins, and the end of the last
    max_length_q: int = 0,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence, in the form that transformers asks for: [1, tokens, heads, size]."""
    assert cu_seq_lens_q is not None
    assert attention_mask is None
    if query.device.type == "cuda":
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        bounds = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        out = varlen_attn(*rows, *bounds, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(out, Tensor)
        return out[None], None
    starts = cu_seq_lens_q.tolist()
    parts = [
        scaled_dot_product_attention(
            query[:, :, start:end], key[:, :, start:end], value[:, :, start:end],
            is_causal=True, scale=scaling, enable_gqa=True,
        )
        for start, end in itertools.pairwise(starts)
    ]  # fmt: skip
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, lambda *_args, **_kwargs: None)


class PackedEngine(LoraEngine):
    """The trainer's engine with packed passes. The model must have been told ``set_attn_implementation(NAME)``."""

    def _score(self, datums: Sequence[Datum], differentiate: bool = False, thrifty: bool = False) -> list[Scored]:
        self.base.recompute_activations(differentiate and (thrifty or self.settings.gradient_checkpointing is True))
        lengths = [datum.length for datum in datums]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        device, model = self.base.device, self.base.model
        states = model.base_model(
            input_ids=torch.cat([datum.input_ids_L for datum in datums])[None].to(device),
            position_ids=torch.cat([torch.arange(length) for length in lengths])[None].to(device),
            cu_seq_lens_q=starts.to(device, torch.int32),
            max_length_q=max(lengths),
            use_cache=False,
        ).last_hidden_state[0]
        rows = torch.cat([start + datum.predict_at_N for start, datum in zip(starts.tolist(), datums, strict=False)])
        targets = torch.cat([datum.targets_N for datum in datums]).to(device)
        logprobs, entropy = forward._head(model, states.index_select(0, rows.to(device)), targets)
        sizes = [datum.predicted for datum in datums]
        return [Scored(*pair) for pair in zip(logprobs.split(sizes), entropy.split(sizes), strict=True)]
