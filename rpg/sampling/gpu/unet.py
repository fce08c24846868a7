"""The U-Net for sampling on a GPU: BatchNorm folded into convolutions that run on the matrix units.

Bias, ELU, skip connections and the next layer's (x + c) · t are part of each convolution; see
`rpg.sampling.gpu.kernels.toeplitz_conv`. Equal to `ConditionalUNet` in evaluation mode but for rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rpg.generator.denoiser.unet import ConditionalUNet
from rpg.sampling.gpu.kernels.toeplitz_conv import PADDING, ToeplitzConv, first_input


class UNetOnGPU:
    """Answers for whole batches at the steps of one solver.

    Attributes:
        dtype: of the products, and of what it takes and gives.
    """

    def __init__(self, denoiser: ConditionalUNet, timesteps: Sequence[int], dtype: torch.dtype) -> None:
        """Sample with `denoiser`, on a GPU, at `timesteps`, one a step."""
        self.dtype = dtype
        weight = denoiser.condi_embedder.weight
        with torch.inference_mode():
            self._time = denoiser.time_embedder(torch.tensor(timesteps, device=weight.device)).float()
        self._condition = weight.detach().to(dtype), denoiser.condi_embedder.bias.detach().to(dtype)
        self._encoder_layers = len(denoiser.encoder_list)
        layers = [*denoiser.encoder_list, *denoiser.decoder_list]
        self._layers = [_folded(layer, dtype) for layer in layers]
        self._buffers: dict[tuple[object, ...], Tensor] = {}

    @staticmethod
    def serves(denoiser: ConditionalUNet, token_size: int) -> bool:
        """Whether the kernels take the network's sizes."""
        convolutions = [layer[0] for layer in (*denoiser.encoder_list, *denoiser.decoder_list)]
        channels = {convolution.out_channels for convolution in convolutions} - {1}
        kernel = convolutions[0].kernel_size[0]
        powers = all(value >= 16 and value & (value - 1) == 0 for value in channels)
        return powers and kernel <= 7 and token_size % 64 == 0

    def prepare(self, prototypes: Tensor) -> Tensor:
        """The prototypes at the token's length, [N, token_size], in `dtype`."""
        return nn.functional.linear(prototypes.to(self.dtype), *self._condition)

    def denoise(self, x: Tensor, step: int, condition: Tensor) -> Tensor:
        """Predict for noisy tokens `x` [N, token_size] at the timestep of `step`, like `ConditionalUNet`."""
        time = self._time[step]
        encoder = self._encoder_layers
        current = self._buffer(x, 1, "input")
        first_input(x, condition, time, self._layers[0].margin, current)
        for i, layer in enumerate(self._layers[:-1]):
            # Outputs of all but the encoder's last two layers are added to the decoder's inputs, in reverse.
            kept = self._buffer(x, layer.outputs, f"kept {i}") if i < encoder - 2 else None
            skip = None
            if i >= encoder - 1:
                skip = self._buffer(x, layer.outputs, f"kept {2 * encoder - 4 - i}")
            after = self._buffer(x, layer.outputs, f"turn {i % 2}")
            layer(current, after, condition, time, skip, kept)
            current = after
        out = torch.empty_like(x)
        self._layers[-1](current, out)
        return out

    def _buffer(self, like: Tensor, channels: int, use: str) -> Tensor:
        """Zero at first, so that what no layer writes, the margins of every token, stays zero."""
        shape = (len(like), like.shape[1] + PADDING, channels)
        key = (use, shape)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros(shape, dtype=self.dtype, device=like.device)
        return self._buffers[key]


def _folded(layer: nn.Module, dtype: torch.dtype) -> ToeplitzConv:
    """A layer of the U-Net as one product: conv, then BatchNorm with its running statistics if it has one."""
    assert isinstance(layer, nn.Sequential) and isinstance(layer[0], nn.Conv1d)
    convolution = layer[0]
    weight, bias = convolution.weight.detach().double(), convolution.bias
    assert bias is not None
    shift = bias.detach().double()
    if len(layer) > 1:
        assert isinstance(layer[1], nn.Sequential) and isinstance(layer[1][0], nn.BatchNorm1d)
        norm = layer[1][0]
        assert norm.running_var is not None and norm.running_mean is not None
        scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * scale[:, None, None]
        shift = (shift - norm.running_mean.double()) * scale + norm.bias.detach().double()
    inputs, outputs = convolution.in_channels, convolution.out_channels
    return ToeplitzConv.of(weight, shift, _group(inputs, outputs), dtype)


def _group(inputs: int, outputs: int) -> int:
    """Neighbouring positions computed together: what was fastest on an H100."""
    if inputs == 1:
        return 8
    if outputs == 1:
        return 32
    return 2 if outputs <= 64 else 1
