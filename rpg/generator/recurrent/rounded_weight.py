"""A linear layer under autocast that rounds its weight twice instead of keeping the rounded one.

Autograd keeps what a product was made of. Of a layer that is large against its batch that is, above all, the
weight in half precision, which costs little to make again from the weight itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`layer(x)`, for a layer without bias and hooks; what it is rounded to is as autocast has it."""
    assert layer.bias is None
    kind = x.device.type
    rounds = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    if not (rounds and torch.is_grad_enabled()):
        return F.linear(x, layer.weight)
    out: Tensor = _RoundedWeight.apply(  # type: ignore[no-untyped-call]
        x, layer.weight, torch.get_autocast_dtype(kind)
    )
    return out


class _RoundedWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.x_dtype = x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        by_x = (gradient @ weight.to(gradient.dtype)).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        by_weight = None
        if ctx.needs_input_grad[1]:
            rows = gradient.reshape(-1, gradient.shape[-1])
            by_weight = (rows.T @ x.reshape(-1, x.shape[-1])).to(weight.dtype)
        return by_x, by_weight, None
