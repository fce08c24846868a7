"""One denoising batch: rows of any models, jobs and conditions that are sampled with the same settings.

Batches always hold the same number of rows, and a model's noise and prototypes are computed in ways that do
not depend on its neighbours: so a model comes out the same whatever it is batched with (invariant 2 of the
design).

On a CPU this needs two precautions, since a row's bits may depend on where in the batch it lies. PyTorch's
vectorised functions (SiLU, ELU) round differently in the remainder behind the last full vector: the number of
rows is a multiple of two vectors, so there is no remainder. Threads leave remainders of their own, and MKL
multiplies a thread's share with a kernel that suits its size: sampling uses one thread. Workers, not threads,
use more of a machine's CPUs; and so a model does not depend on how many there are.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rpg.config import SamplingConfig, validate_sampling
from rpg.errors import RPGError
from rpg.generation.noise import gaussian, seed_word
from rpg.generator.generator import Generator
from rpg.generator.solvers import solver_steps
from rpg.threads import one_thread

PROTOTYPE_PIECE = 256
"""Positions that the recurrent network takes at once, its state carried over: the same grid for all."""

_ROW_MULTIPLE = 32
"""Two vectors of the widest processors, in float32 values."""

_REMEMBERED = 16
"""Conditions whose prototypes are kept: of a small network, PROTOTYPE_PIECE rows at most."""


@dataclass(frozen=True)
class ModelRequest:
    """One model to sample: its index in the job, and its condition, a row as the generator takes it."""

    index: int
    condition: Tensor


class Rows(NamedTuple):
    """Tokens about to be sampled: whose they are (int64 [N] each), and their prototypes [N, width] each."""

    seeds: Tensor
    models: Tensor
    tokens: Tensor
    prototypes: Tensor
    unconditional: Tensor

    def split(self, count: int) -> "tuple[Rows, Rows]":
        """The first `count` rows, and the others."""
        return Rows(*(part[:count] for part in self)), Rows(*(part[count:] for part in self))

    @staticmethod
    def joined(pieces: "Sequence[Rows]") -> "Rows":
        """The rows of all `pieces`, in order."""
        return Rows(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


class BatchSampler:
    """Samples batches of rows from one generator, on its device.

    Attributes:
        size: rows that every batch is filled up to.
    """

    def __init__(self, generator: Generator, sampling: SamplingConfig) -> None:
        validate_sampling(sampling, generator.config)
        self.generator = generator.eval()
        self.sampling = sampling
        self.size = -(-sampling.token_batch // _ROW_MULTIPLE) * _ROW_MULTIPLE
        self.steps = solver_steps(generator.diffusion.alpha_bar, sampling)
        self.device = generator.positions.device
        self._latest: OrderedDict[bytes, tuple[Tensor, Tensor]] = OrderedDict()

    def rows(self, request: ModelRequest, seed: int) -> Iterator[Rows]:
        """The rows of one model of a job of this `seed` (0 <= seed < 2**64), piece by piece, in order.

        Raises:
            RPGError: for a seed out of range.
        """
        check_seed(seed)
        start = 0
        for prototypes, unconditional in self._prototype_pieces(request.condition):
            tokens = torch.arange(start, start + len(prototypes), device=self.device)
            models = torch.full_like(tokens, request.index)
            yield Rows(torch.full_like(tokens, seed_word(seed)), models, tokens, prototypes, unconditional)
            start += len(prototypes)

    def denoise(self, rows: Rows) -> Tensor:
        """Sample the tokens of at most `size` rows: normalised values [N, token_size]."""
        with torch.inference_mode(), _one_thread(self.device):
            return self._denoise(rows)

    def _prototype_pieces(self, condition: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        positions = self.generator.positions
        key = condition.cpu().numpy().tobytes()
        if len(positions) <= PROTOTYPE_PIECE and key in self._latest:
            # Models of one condition follow each other: a small network's prototypes are computed once.
            self._latest.move_to_end(key)
            yield self._latest[key]
            return
        row = condition[None].to(self.device)
        with torch.inference_mode(), _one_thread(self.device):
            embedded = self.generator.condition(row)
            null = self.generator.condition(row, torch.ones(1, dtype=torch.bool, device=self.device))
        recurrent, state, null_state = self.generator.recurrent, None, None
        for piece in torch.split(positions, PROTOTYPE_PIECE):
            with torch.inference_mode(), _one_thread(self.device):
                prototypes, state = recurrent(piece[None] + embedded[:, None], state)
                unconditional = prototypes
                if self.sampling.guidance != 1:
                    unconditional, null_state = recurrent(piece[None] + null[:, None], null_state)
            result = prototypes[0], unconditional[0]
            if len(positions) <= PROTOTYPE_PIECE:
                self._latest[key] = result
                if len(self._latest) > _REMEMBERED:
                    self._latest.popitem(last=False)
            yield result

    def _denoise(self, rows: Rows) -> Tensor:
        count = len(rows.models)
        padding = self.size - count
        seeds, models, tokens = (
            torch.nn.functional.pad(part, (0, padding)) for part in (rows.seeds, rows.models, rows.tokens)
        )
        denoiser, guidance = self.generator.denoiser, self.sampling.guidance
        token_size = self.generator.layout.token_size
        prepared = denoiser.prepare(torch.nn.functional.pad(rows.prototypes, (0, 0, 0, padding)))
        if guidance != 1:
            null = denoiser.prepare(torch.nn.functional.pad(rows.unconditional, (0, 0, 0, padding)))
        x = gaussian(seeds, models, tokens, 0, token_size) * self.sampling.temperature
        previous = torch.zeros_like(x)
        for i, step in enumerate(self.steps):
            t = torch.tensor([step.t], device=self.device)
            prediction = denoiser.denoise(x, t, prepared)
            if guidance != 1:
                unconditional = denoiser.denoise(x, t, null)
                prediction = unconditional + guidance * (prediction - unconditional)
            estimate = self.generator.diffusion.to_x0(prediction, x, step.t)
            x = step.current * x + step.estimate * estimate
            if step.previous_estimate:
                x = x + step.previous_estimate * previous
            if step.noise:
                x = x + step.noise * gaussian(seeds, models, tokens, i + 1, token_size)
            previous = estimate
        return x[:count]


def check_seed(seed: int) -> None:
    """Raise an `RPGError` for a seed out of range."""
    if not 0 <= seed < 2**64:
        raise RPGError(f"seed: expected 0 <= seed < 2**64, got {seed}")


def _one_thread(device: torch.device) -> AbstractContextManager[None]:
    """Run a block's CPU operations on one thread; nothing changes for other devices."""
    return one_thread() if device.type == "cpu" else nullcontext()
