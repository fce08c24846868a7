"""Elements of sequences, chosen for each sequence by their positions."""

import torch
from torch import Tensor


def elements_at(sequences: Tensor, at: Tensor | None) -> Tensor:
    """Elements `at`, int64 [B, K], of sequences [B, L, W]: [B, K, W]; without `at` all of them, [B, L, W]."""
    if at is None:
        return sequences
    length = sequences.shape[1]
    first = length * torch.arange(len(at), device=at.device)
    # index_select takes one index for each row. A gather would need one for each value, also in its gradient.
    rows = sequences.flatten(0, 1).index_select(0, (at + first[:, None]).flatten())
    return rows.view(*at.shape, -1)
