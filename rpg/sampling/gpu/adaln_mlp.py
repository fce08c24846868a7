"""The AdaLN MLP for sampling on a GPU: half-precision or 8-bit products, everything between them fused.

What the timestep contributes to the modulation is computed once a sampler, what the prototype contributes
once a token. Equal to `AdaLNMLP` but for rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.sampling.gpu.kernels.adaln import add_gated_normalise_modulate, normalise_modulate
from rpg.sampling.gpu.kernels.float8 import DTYPE, LARGEST, quantise_rows


class AdaLNMLPOnGPU:
    """Answers for whole batches at the steps of one solver.

    Attributes:
        dtype: of what it takes and gives, and of the products where they are not in 8 bits.
    """

    def __init__(
        self, denoiser: AdaLNMLP, timesteps: Sequence[int], dtype: torch.dtype, float8: bool = False
    ) -> None:
        """Sample with `denoiser`, on a GPU, at `timesteps`, one a step.

        `float8`: see `rpg.sampling.precision.samples_in_float8`.
        """
        self.dtype = dtype
        self.width = denoiser.width
        self._float8 = float8
        t = torch.tensor(timesteps, device=denoiser.input.weight.device)
        with torch.inference_mode():
            self._by_time = denoiser.timestep_modulation(F.silu(denoiser.timestep(t)))
        # This product is computed once a token, so 8 bits would gain little for their rounding.
        self._modulation = Product(denoiser.prototype_modulation, dtype)
        self._input = Product(denoiser.input, dtype, float8)
        layers = [block.children() for block in denoiser.blocks]
        self._blocks = [
            (Product(first, dtype, float8), Product(last, dtype, float8)) for first, _, last in layers
        ]
        self._output = Product(denoiser.output, dtype, float8)

    def prepare(self, prototypes: Tensor) -> Tensor:
        """The prototypes' part of the modulation, [N, (3 · depth + 2) · width], in `dtype`."""
        return self._modulation(F.silu(prototypes).to(self.dtype))

    def denoise(self, x: Tensor, step: int, modulation: Tensor) -> Tensor:
        """Predict for noised tokens `x` [N, token_size] at the timestep of `step`, like `AdaLNMLP`."""
        width, by_time = self.width, self._by_time[step]
        x = self._input(*self._factor(x, silu=False))
        y, scales = self._room(x)
        normalise_modulate(x, modulation, by_time, 0, y, scales)
        for i, (first, second) in enumerate(self._blocks):
            branch = second(*self._factor(first(y, scales), silu=True))
            gate = (3 * i + 2) * width
            add_gated_normalise_modulate(x, branch, modulation, by_time, gate, gate + width, y, scales)
        return self._output(y, scales)

    def _factor(self, x: Tensor, silu: bool) -> tuple[Tensor, Tensor | None]:
        """`x`, or its SiLU, as products take it, and the scales of its rows in 8 bits."""
        y, scales = self._room(x) if self._float8 else (x, None)
        if scales is not None:
            quantise_rows(x, y, scales, silu)
        elif silu:
            F.silu(x, inplace=True)
        return y, scales

    def _room(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self._float8:
            return torch.empty_like(x), None
        return torch.empty_like(x, dtype=DTYPE), x.new_empty(len(x), 1, dtype=torch.float32)


class Product:
    """A linear layer in another precision."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, float8: bool = False) -> None:
        """Take a copy of the layer's weights.

        Args:
            layer: a linear layer.
            dtype: of weights and factors; with `float8` of bias and results alone.
            float8: whether weights, with a scale for each of their rows, and factors have 8 bits; sizes
                are as `rpg.sampling.precision.samples_in_float8` asks then.
        """
        assert isinstance(layer, nn.Linear)
        weight = layer.weight.detach()
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self._dtype = dtype
        self._scales: Tensor | None = None
        if not float8:
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
