"""Packed sampling: tokens of many models share each denoising batch.

Tokens are taken model by model in order, so peak memory depends on the token batch alone (invariant 3 of the
design). `rpg.sampling.batch_sampler` tells why a model comes out the same whatever it is batched with.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rpg.config import ConditionConfig, ConditionKind, SamplingConfig
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.batch_sampler import BatchSampler, ModelRequest, check_seed
from rpg.sampling.prototypes import PROTOTYPE_PIECE
from rpg.sampling.rows import Rows
from rpg.sampling.sampled import Sampled

__all__ = [
    "PROTOTYPE_PIECE",
    "ModelRequest",
    "PackedSampler",
    "SampledTokens",
    "check_condition",
    "condition_row",
]


class SampledTokens(NamedTuple):
    """Finished tokens, in order: model indices [N] and token indices [N] (int64), values [N, token_size]."""

    models: Tensor
    tokens: Tensor
    values: Tensor


class PackedSampler:
    """Samples the tokens of any number of models of one job from one generator."""

    def __init__(self, generator: Generator, sampling: SamplingConfig, seed: int) -> None:
        """Sample with `sampling` and the job's `seed` (0 <= seed < 2**64), on the generator's device."""
        check_seed(seed)
        self.seed = seed
        self._batches = BatchSampler(generator, sampling)

    def sample(self, requests: Iterable[ModelRequest]) -> Iterator[SampledTokens]:
        """Yield the tokens of all `requests`, model by model and token by token, as batches finish."""
        for rows in self.batches(requests):
            yield SampledTokens(rows.models, rows.tokens, self._batches.denoise(rows))

    def sample_to_write(self, requests: Iterable[ModelRequest]) -> Iterator[tuple[Rows, Sampled]]:
        """As `sample`, in the form that files are written from; a GPU samples on meanwhile."""
        for rows in self.batches(requests):
            yield rows, self._batches.sample(rows)

    def denoise(self, rows: Rows) -> Tensor:
        """As `BatchSampler.denoise`."""
        return self._batches.denoise(rows)

    def batches(self, requests: Iterable[ModelRequest]) -> Iterator[Rows]:
        """The rows of all `requests`, in denoising batches."""
        waiting: list[Rows] = []
        count = 0
        for request in requests:
            for rows in self._batches.rows(request, self.seed):
                waiting.append(rows)
                count += len(rows.models)
                while count >= self._batches.size:
                    batch, rest = Rows.joined(waiting).split(self._batches.size)
                    waiting = [rest] if len(rest.models) else []
                    count -= self._batches.size
                    yield batch
        if count:
            yield Rows.joined(waiting)


def check_condition(generator: Generator, condition: list[float]) -> Tensor:
    """A user's condition as the generator takes it; see `condition_row`."""
    return condition_row(generator.config.condition, condition)


def condition_row(config: ConditionConfig, condition: list[float]) -> Tensor:
    """A user's condition as a generator of this configuration takes it, float32 [size].

    Raises:
        RPGError: if the generator takes none, or one of another width, or a value is not finite.
    """
    if config.kind != ConditionKind.vector:
        raise RPGError(
            f"condition: this generator takes none (its kind is '{config.kind}'), got {len(condition)} values"
        )
    if len(condition) != config.size:
        raise RPGError(f"condition: expected {config.size} values, got {len(condition)}")
    values = torch.tensor(condition, dtype=torch.float32)
    if not values.isfinite().all():
        raise RPGError(f"condition: expected finite values, got {condition}")
    return values
