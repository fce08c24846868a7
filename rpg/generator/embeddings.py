"""Sinusoidal embeddings: of a token's place in the network, and of the diffusion timestep."""

import math

import torch
from torch import Tensor, nn

from rpg.collection.layout import Layout
from rpg.config import Positions
from rpg.errors import RPGError

MAX_PERIOD = 10000


def embedded_positions(kind: Positions, layout: Layout, width: int) -> Tensor:
    """The embeddings of the places of a layout's tokens, float32 [tokens, width]; learned ones as they start.

    Raises:
        RPGError: if `width` is not a positive multiple of 4.
    """
    if kind == Positions.sinusoid_1d:
        return sinusoids(torch.arange(layout.tokens), width)
    return position_embedding(layout.positions(), width)


def position_embedding(positions: Tensor, width: int) -> Tensor:
    """The 2-D sinusoid of the published model (arXiv 2501.11587).

    The first half of the channels encodes the token index within the tensor, the second half the tensor
    index; within a half, channel 2k is sin(index · f_k) and channel 2k + 1 is cos(index · f_k), with
    f_k = 10000^(-2k / half).

    Args:
        positions: integers [T, 2]: tensor index, token index within the tensor.
        width: a multiple of 4.

    Returns:
        float32 [T, width], on the device of `positions`.

    Raises:
        RPGError: if `width` is not a positive multiple of 4.
    """
    if width < 4 or width % 4:
        raise RPGError(f"position embedding: width: expected a positive multiple of 4, got {width}")
    return sinusoids(positions.flip(-1), width // 2).flatten(1)


def sinusoids(indices: Tensor, width: int) -> Tensor:
    """Integers [...] as float32 [..., width]: channel 2k is sin(index · f_k) and channel 2k + 1 is
    cos(index · f_k), with f_k = 10000^(-2k / width); `width` is even."""
    # float32 would lose the phase of indices in the tens of thousands.
    even = torch.arange(0, width, 2, dtype=torch.float64, device=indices.device)
    frequencies = torch.exp(-even * (math.log(MAX_PERIOD) / width))
    angles = indices.to(torch.float64).unsqueeze(-1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2).to(torch.float32)


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of the timestep, through a two-layer perceptron; both denoisers use it.

    Feature k is cos(t · f_k) for k < half, then sin(t · f_{k - half}), with f_k = 10000^(-k / half) and
    half = frequencies / 2. Parameters and the buffer `freqs` are named as in the published code.

    Raises:
        RPGError: if `frequencies` is odd.
    """

    freqs: Tensor

    def __init__(self, width: int, frequencies: int = 256) -> None:
        super().__init__()
        if frequencies % 2:
            raise RPGError(f"TimestepEmbedding: frequencies: expected an even number, got {frequencies}")
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))
        half = frequencies // 2
        self.register_buffer("freqs", torch.exp(torch.arange(half) * (-math.log(MAX_PERIOD) / half)))

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps [G], integer or floating point, as [G, width]."""
        accurate = torch.promote_types(self.freqs.dtype, torch.float32)
        angles = t.to(accurate).unsqueeze(-1) * self.freqs
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.freqs.dtype)
        embedding: Tensor = self.mlp(features)
        return embedding
