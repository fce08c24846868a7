"""The AdaLN MLP for sampling on a GPU: half-precision products, everything between them fused.

What the timestep contributes to the modulation is computed once a sampler, what the prototype contributes
once a token. Equal to `AdaLNMLP` but for rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.kernels.adaln import add_gated_normalise_modulate, normalise_modulate


class AdaLNMLPOnGPU:
    """Answers for whole batches at the steps of one solver.

    Attributes:
        dtype: of the products, and of what it takes and gives.
    """

    def __init__(self, denoiser: AdaLNMLP, timesteps: Sequence[int], dtype: torch.dtype) -> None:
        """Sample with `denoiser`, on a GPU, at `timesteps`, one a step."""
        self.dtype = dtype
        self.width = denoiser.width
        t = torch.tensor(timesteps, device=denoiser.input.weight.device)
        with torch.inference_mode():
            self._by_time = denoiser.timestep_modulation(F.silu(denoiser.timestep(t)))
        self._input = _Product(denoiser.input, dtype)
        self._modulation = _Product(denoiser.prototype_modulation, dtype)
        layers = [block.children() for block in denoiser.blocks]
        self._blocks = [(_Product(first, dtype), _Product(last, dtype)) for first, _, last in layers]
        self._output = _Product(denoiser.output, dtype)

    def prepare(self, prototypes: Tensor) -> Tensor:
        """As `AdaLNMLP.prepare`, in `dtype`."""
        return self._modulation(F.silu(prototypes).to(self.dtype))

    def denoise(self, x: Tensor, step: int, modulation: Tensor) -> Tensor:
        """As `AdaLNMLP.denoise` for noised tokens `x` [N, token_size] at the timestep of `step`."""
        width, by_time = self.width, self._by_time[step]
        x = self._input(x)
        y = torch.empty_like(x)
        normalise_modulate(x, modulation, by_time, 0, y)
        for i, (first, second) in enumerate(self._blocks):
            branch = second(F.silu(first(y), inplace=True))
            gate = (3 * i + 2) * width
            add_gated_normalise_modulate(x, branch, modulation, by_time, gate, gate + width, y)
        return self._output(y)


class _Product:
    """A linear layer in another precision."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        assert isinstance(layer, nn.Linear)
        self.weight = layer.weight.detach().to(dtype)
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
