"""Elements of sequences, chosen for each by their positions."""

import torch
from torch import Tensor


def chosen(sequences: Tensor, at: Tensor | None) -> Tensor:
    """Elements `at`, int64 [B, K], of sequences [B, L, W]: [B, K, W]; without `at` all of them, [B, L, W]."""
    if at is None:
        return sequences
    length = sequences.shape[1]
    first = length * torch.arange(len(at), device=at.device)
    # Whole rows by one index each: a gather would carry an index for every value into its gradient.
    rows = sequences.flatten(0, 1).index_select(0, (at + first[:, None]).flatten())
    return rows.view(*at.shape, -1)
