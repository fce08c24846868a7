"""Linear layers of a denoiser that samples on a GPU, in half precision or in 8-bit floats."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.sampling.gpu.kernels.float8 import DTYPE, LARGEST


class Product:
    """A linear layer in another precision."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, eight_bits: bool = False) -> None:
        """Take a copy of the layer's weights.

        Args:
            layer: a linear layer.
            dtype: of weights and factors; with `eight_bits` of bias and results alone.
            eight_bits: whether weights, with a scale for each of their rows, and factors have 8 bits; sizes
                are as `rpg.sampling.precision.samples_in_eight_bits` asks then.
        """
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach()
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self._dtype = dtype
        self._scales: Tensor | None = None
        if not eight_bits:
            self.weight = weight.to(dtype)
            return
        scales = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-30) / LARGEST
        self.weight = (weight.float() / scales).to(DTYPE)
        self._scales = scales.T.contiguous()

    def __call__(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """The layer's output for rows `x` [N, in_features], or x · `scales` [N, 1] in 8 bits."""
        if scales is None or self._scales is None:
            return F.linear(x, self.weight, self.bias)
        return scaled_product(x, scales, self.weight.T, self._scales, self.bias, self._dtype)


def scaled_product(
    a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(a · a_scales) @ (b · b_scales) + bias in `dtype`, of 8-bit `a` [N, K] and `b` [K, M], on a GPU alone.

    Args:
        a, b: row by row, and column by column in memory.
        a_scales, b_scales: float32 [N, 1] and [1, M].
        bias: [M] of `dtype`, or None.
        dtype: of the result, bfloat16.
    """
    by_row = F.ScalingType.RowWise
    return F.scaled_mm(
        a, b, a_scales, by_row, b_scales, by_row, bias=bias, output_dtype=dtype, use_fast_accum=True
    )
