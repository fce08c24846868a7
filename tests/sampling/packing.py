"""Tokens of several models, sampled in full batches as the engine packs them, without files."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rpg.config import SamplingConfig
from rpg.generator.generator import Generator
from rpg.sampling.batch_sampler import BatchSampler
from rpg.sampling.rows import Rows


class Asked(NamedTuple):
    """One model: its index in its job, and its condition as the generator takes it."""

    index: int
    condition: Tensor


def packed(
    generator: Generator, sampling: SamplingConfig, asked: Sequence[Asked], seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Model indices [N], token indices [N] and values [N, token_size] of each batch, in order."""
    sampler = BatchSampler(generator, sampling)
    pieces = [rows for each in asked for rows in sampler.rows(each.index, each.condition, seed)]
    rest = Rows.joined(pieces) if pieces else None
    while rest is not None and len(rest.tokens):
        batch, rest = rest.split(sampler.size)
        yield batch.models, batch.tokens, sampler.denoise(batch)


def sampled_tokens(
    generator: Generator, sampling: SamplingConfig, asked: Sequence[Asked], seed: int
) -> Tensor:
    """The tokens of all models, one after the other: [models * tokens, token_size]."""
    return torch.cat([values for _, _, values in packed(generator, sampling, asked, seed)])
