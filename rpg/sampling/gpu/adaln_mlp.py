"""The AdaLN MLP for sampling on a GPU: half-precision or 8-bit products, everything between them fused.

What the timestep contributes to the modulation is computed once a sampler, what the prototype contributes
once a token. Equal to `AdaLNMLP` but for rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.sampling.gpu.kernels.adaln import add_gated_normalise_modulate, normalise_modulate
from rpg.sampling.gpu.kernels.float8 import DTYPE, quantise_rows
from rpg.sampling.gpu.linear import Product


class AdaLNMLPOnGPU:
    """Answers for whole batches at the steps of one solver.

    Attributes:
        dtype: of what it takes and gives, and of the products where they are not in 8 bits.
    """

    def __init__(
        self, denoiser: AdaLNMLP, timesteps: Sequence[int], dtype: torch.dtype, eight_bits: bool = False
    ) -> None:
        """Sample with `denoiser`, on a GPU, at `timesteps`, one a step.

        `eight_bits`: see `rpg.sampling.precision.samples_in_eight_bits`.
        """
        self.dtype = dtype
        self.width = denoiser.width
        self._eight_bits = eight_bits
        t = torch.tensor(timesteps, device=denoiser.input.weight.device)
        with torch.inference_mode():
            self._by_time = denoiser.timestep_modulation(F.silu(denoiser.timestep(t)))
        # This product is computed once a token, so 8 bits would gain little for their rounding.
        self._modulation = Product(denoiser.prototype_modulation, dtype)
        self._input = Product(denoiser.input, dtype, eight_bits)
        layers = [block.children() for block in denoiser.blocks]
        self._blocks = [
            (Product(first, dtype, eight_bits), Product(last, dtype, eight_bits)) for first, _, last in layers
        ]
        self._output = Product(denoiser.output, dtype, eight_bits)

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
        y, scales = self._room(x) if self._eight_bits else (x, None)
        if scales is not None:
            quantise_rows(x, y, scales, silu)
        elif silu:
            F.silu(x, inplace=True)
        return y, scales

    def _room(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self._eight_bits:
            return torch.empty_like(x), None
        return torch.empty_like(x, dtype=DTYPE), x.new_empty(len(x), 1, dtype=torch.float32)
