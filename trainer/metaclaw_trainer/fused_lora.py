"""A linear layer with LoRA whose forward and backward are one node of the autograd graph.

    y = x W^T + bias + s (x A^T) B^T

PEFT's own layer keeps its input three times and builds eight nodes; on short sequences that costs as much as the
arithmetic. Here x and x A^T are kept, W never gets a gradient, and the gradients are those of the formula:

    dB = s dy^T (x A^T)        dA = (s dy B)^T x        dx = dy W + (s dy B) A

On a CPU in float32 even the thin products with A and B cost a fifth of the layer. There W + s B A is made once for a
whole batch, in a buffer beside W (which never changes), and forward and dx take one product each:

    y = x (W + s B A)^T + bias        dx = dy (W + s B A)

Not in bfloat16, where adding would round the adapter away.

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

    _sum: Tensor | None = None  # a buffer of the shape of W
    _merged_for: str | None = None  # adapter whose sum it holds

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        base = self.get_base_layer()
        active = self._active_adapter
        if self._disable_adapters or not active or active[0] not in self.lora_A:
            return cast(Tensor, base(x))
        name = active[0]
        a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        if self._merged_for == name:
            return cast(Tensor, _MergedProduct.apply(x, self._sum, base.bias, a, b, scale))
        return cast(Tensor, _LoraProduct.apply(x, base.weight, base.bias, a, b, scale))

    def activate(self, name: str | None) -> None:
        """Make ``name`` the one adapter of the next forward pass; ``None``: the base model alone.

        ``set_adapter`` of PEFT also walks over the parameters of every adapter; that is not needed here, since only
        those in the graph ever get a gradient.
        """
        self._active_adapter = [] if name is None else [name]

    def add_up(self, name: str | None) -> None:
        """Use W + s B A of adapter ``name`` as it is now, until told otherwise; ``None``: use no sum."""
        self._merged_for = None
        if name is None or name not in self.lora_A:
            return
        weight = self.get_base_layer().weight
        if self._sum is None:
            self._sum = torch.empty_like(weight)
        with torch.no_grad():
            torch.addmm(
                weight, self.lora_B[name].weight, self.lora_A[name].weight, alpha=self.scaling[name], out=self._sum
            )
        self._merged_for = name

    def forget_sum(self) -> None:
        """Give the buffer back."""
        self._merged_for, self._sum = None, None


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


class _MergedProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, merged: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, merged, a, b)
        ctx.scale = scale  # type: ignore[attr-defined]
        return F.linear(x, merged, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, merged, a, b = ctx.saved_tensors
        rows, dy = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        db = (dy.T @ (rows @ a.T)).mul_(ctx.scale)
        da = (dy @ b).mul_(ctx.scale).T @ rows
        dx = (dy @ merged).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, da, db, None
