"""Cutting a tensor's values into tokens: rows of equal length, padded with 0 at the tensor's end."""

import torch
from torch import Tensor


def count_tokens(numel: int, token_size: int) -> int:
    """Number of tokens that `numel` values fill."""
    return -(-numel // token_size)


def cut(values: Tensor, token_size: int) -> Tensor:
    """Values [n] as tokens [ceil(n / token_size), token_size], padded with 0."""
    tokens = count_tokens(values.numel(), token_size)
    padding = tokens * token_size - values.numel()
    return torch.nn.functional.pad(values, (0, padding)).view(tokens, token_size)


def join(tokens: Tensor, numel: int) -> Tensor:
    """Inverse of `cut`: tokens [t, token_size] to the first `numel` values, padding dropped."""
    return tokens.reshape(-1)[:numel]


def token_lengths(numel: int, token_size: int) -> Tensor:
    """Values in each of a tensor's tokens: int64 [t], all `token_size` but the last."""
    lengths = torch.full((count_tokens(numel, token_size),), token_size, dtype=torch.int64)
    if len(lengths):
        lengths[-1] = numel - token_size * (len(lengths) - 1)
    return lengths
