"""A linear layer with LoRA whose forward and backward are one node of the autograd graph.

    y = x W^T + bias + s (x A^T) B^T

PEFT's own layer keeps its input three times and builds eight nodes; on short sequences that costs as much as the
arithmetic. Here x and x A^T are kept, W never gets a gradient, and the gradients are those of the formula:

    dB = s dy^T (x A^T)        dA = (s dy B)^T x        dx = dy W + (s dy B) A

Weights, names and files stay PEFT's: this is registered with it as the layer to put in the place of ``nn.Linear``.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F


class FusedLinear(Linear):  # type: ignore[misc]  # peft carries no types
    """PEFT's LoRA layer with the fused arithmetic. At most one adapter is active, as everywhere in this trainer."""

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        active = self._active_adapter
        if self._disable_adapters or not active or active[0] not in self.lora_A:
            return cast(Tensor, base(x))
        name = active[0]
        y = _LoraProduct.apply(
            x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        )
        return cast(Tensor, y)

    def activate(self, name: str | None) -> None:
        """Make ``name`` the one adapter of the next forward pass; ``None``: the base model alone.

        ``set_adapter`` of PEFT also walks over the parameters of every adapter; that is not needed here, since only
        those in the graph ever get a gradient.
        """
        self._active_adapter = [] if name is None else [name]


class _LoraProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        a_here, b_here = a.to(x.dtype), b.to(x.dtype)
        inner = rows @ a_here.T
        y = F.linear(rows, weight, bias)
        y.addmm_(inner, b_here.T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape  # type: ignore[attr-defined]
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, weight, a, b = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        dv = (dy @ b.to(dy.dtype)).mul_(ctx.scale)
        db = (dy.T @ inner).mul_(ctx.scale).to(b.dtype)
        da = (dv.T @ rows).to(a.dtype)
        dx = None
        if ctx.needs_input_grad[0]:  # not in the first layer: nothing below it learns
            dx = (dy @ weight).addmm_(dv, a.to(dy.dtype)).view(ctx.shape)
        return dx, None, None, da, db, None
