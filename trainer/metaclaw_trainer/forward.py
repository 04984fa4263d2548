"""Log-probabilities of chosen tokens, with logits only where one is asked for.

The head of a language model is a product with the whole vocabulary: for the third of a sequence that was sampled it
costs as much as several layers do for all of it. So hidden states are picked first and multiplied after, in chunks,
and the softmax is kept only if it is small. (The idea of Liger's fused linear cross-entropy, arXiv:2410.10989, and of
"Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009, for a frozen head.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metaclaw_trainer.batching import Datum

KEEP_ROWS = 512  # positions whose softmax is kept for the backward pass; more are computed again, chunk by chunk

_CACHED_ROWS = 8  # positions whose logits stay in a CPU's cache while all is made of them that is needed


class Scored(NamedTuple):
    """One value per predicted token."""

    logprobs_N: Tensor  # natural logarithm, temperature 1; differentiable
    entropy_N: Tensor  # of the whole distribution, in nats; no gradient


def score(model: nn.Module, datums: Sequence[Datum], device: torch.device) -> list[Scored]:
    """Score the targets of all ``datums`` in one right-padded forward pass.

    No mask is needed: attention is causal and the padding comes last, so no position that counts ever sees it.
    ``model`` is a causal language model of transformers, with or without adapters in its layers.
    """
    longest = max(datum.length for datum in datums)
    input_ids = torch.zeros(len(datums), longest, dtype=torch.int64)
    for row, datum in enumerate(datums):
        input_ids[row, : datum.length] = datum.input_ids_L
    rows = [row * longest + datum.predict_at_N for row, datum in enumerate(datums)]
    decoder = cast(Any, model).base_model
    # use_cache: a KV cache would be kept for nothing, and is wrong together with recomputed activations
    states = decoder(input_ids=input_ids.to(device), use_cache=False).last_hidden_state
    picked = states.reshape(-1, states.shape[-1]).index_select(0, torch.cat(rows).to(device))
    targets = torch.cat([datum.targets_N for datum in datums]).to(device)
    logprobs, entropy = _head(model, picked, targets)
    sizes = [datum.predicted for datum in datums]
    return [Scored(*pair) for pair in zip(logprobs.split(sizes), entropy.split(sizes), strict=True)]


def _head(model: nn.Module, states_NH: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    head = cast(nn.Linear, cast(Any, model).get_output_embeddings())
    return cast("tuple[Tensor, Tensor]", _HeadLogprobs.apply(states_NH, head.weight, head.bias, targets_N))


def unsupported_head(model: Any) -> str | None:
    """Why this model's head is more than a linear layer; ``None``: it is just that."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return f"its output layer is {type(head).__name__}, not a linear layer"
    config = model.config.get_text_config()
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(config, name, None)
        if value not in (None, 1, 1.0):
            return f"its configuration changes logits after the output layer ({name}={value})"
    return None


class _HeadLogprobs(torch.autograd.Function):
    """log softmax(states W^T + bias)[targets], and the entropy, in float32; W is frozen."""

    @staticmethod
    def forward(
        ctx: Any, states_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, kept = [], [], None
        differentiate = ctx.needs_input_grad[0]
        for states, targets in zip(states_NH.split(KEEP_ROWS), targets_N.split(KEEP_ROWS), strict=True):
            logits = nn.functional.linear(states, weight_VH, bias_V)
            kept = logits if logits.dtype == torch.float32 else torch.empty_like(logits, dtype=torch.float32)
            rows = _CACHED_ROWS if logits.device.type == "cpu" else len(logits)
            for part, target, p in zip(logits.split(rows), targets.split(rows), kept.split(rows), strict=True):
                logp = torch.log_softmax(part, dim=-1, dtype=torch.float32)
                logprobs.append(logp.gather(1, target[:, None])[:, 0])
                torch.exp(logp, out=p)  # in the place of the logits, which are not needed any more
                entropies.append(-logp.mul_(p).sum(-1))
        small = differentiate and states_NH.shape[0] <= KEEP_ROWS
        ctx.save_for_backward(states_NH, weight_VH, bias_V, targets_N, kept if small else None)
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logprobs), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        states_NH, weight_VH, bias_V, targets_N, kept = ctx.saved_tensors
        parts = []
        chunks = zip(states_NH.split(KEEP_ROWS), targets_N.split(KEEP_ROWS), grad_N.split(KEEP_ROWS), strict=True)
        for states, targets, grad in chunks:
            p = kept if kept is not None else _softmax(states, weight_VH, bias_V)
            # d logprob / d logits = onehot - p
            expected = torch.mm(p.to(weight_VH.dtype), weight_VH)
            parts.append((weight_VH.index_select(0, targets) - expected) * grad[:, None].to(weight_VH.dtype))
        return torch.cat(parts).to(states_NH.dtype), None, None, None


def _softmax(states: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    return torch.softmax(nn.functional.linear(states, weight_VH, bias_V), dim=-1, dtype=torch.float32)
