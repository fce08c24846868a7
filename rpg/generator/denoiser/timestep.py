"""Embedding of the diffusion timestep, shared by the denoisers."""

import math

import torch
from torch import Tensor, nn

from rpg.errors import RPGError

MAX_PERIOD = 10000


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of the timestep, through a two-layer perceptron.

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
        """Timesteps [N], integer or floating point -> [N, width]."""
        accurate = torch.promote_types(self.freqs.dtype, torch.float32)
        angles = t.to(accurate).unsqueeze(-1) * self.freqs
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.freqs.dtype)
        embedding: Tensor = self.mlp(features)
        return embedding
