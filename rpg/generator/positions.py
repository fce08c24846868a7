"""Position embeddings: where in the network a token belongs."""

import math

import torch
from torch import Tensor

from rpg.errors import RPGError


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
    half = width // 2
    # float32 would lose the phase of indices in the tens of thousands.
    even = torch.arange(0, half, 2, dtype=torch.float64, device=positions.device)
    frequencies = torch.exp(-even * (math.log(10000) / half))
    angles = positions.flip(-1).to(torch.float64).unsqueeze(-1) * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(torch.float32)
