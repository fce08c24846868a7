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

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rpg.config import SamplingConfig, SamplingPrecision, validate_sampling
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.gpu.decoder import TokenDecoder
from rpg.sampling.noise import seed_word
from rpg.sampling.placement import used_precision
from rpg.sampling.plain_loop import PlainLoop
from rpg.sampling.prototypes import Prototypes, sampling_threads
from rpg.sampling.rows import Rows
from rpg.sampling.sampled import HostCopies, Sampled, SampledBatch
from rpg.sampling.solvers import solver_steps

if TYPE_CHECKING:
    from rpg.sampling.gpu.loop import GPULoop

_ROW_MULTIPLE = 32
"""Two vectors of the widest processors, in float32 values."""


@dataclass(frozen=True)
class ModelRequest:
    """One model to sample: its index in the job, and its condition, a row as the generator takes it."""

    index: int
    condition: Tensor


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
        self.device = generator.positions.device
        self._prototypes = Prototypes(generator, sampling)
        self._loop: PlainLoop | GPULoop | None = None
        self._decoder: TokenDecoder | None = None
        self._copies: HostCopies | None = None
        if self.device.type == "cuda" and TokenDecoder.serves(generator.layout):
            self._decoder = TokenDecoder(generator.layout, self.device)
            self._copies = HostCopies(self.device)

    def rows(self, request: ModelRequest, seed: int) -> Iterator[Rows]:
        """The rows of one model of a job of this `seed` (0 <= seed < 2**64), piece by piece, in order.

        Raises:
            RPGError: for a seed out of range.
        """
        check_seed(seed)
        start = 0
        for prototypes, unconditional in self._prototypes.pieces(request.condition):
            tokens = torch.arange(start, start + len(prototypes))
            models = torch.full_like(tokens, request.index)
            yield Rows(torch.full_like(tokens, seed_word(seed)), models, tokens, prototypes, unconditional)
            start += len(prototypes)

    def denoise(self, rows: Rows) -> Tensor:
        """Sample the tokens of at most `size` rows: normalised values, float32 [N, token_size]."""
        with torch.inference_mode(), sampling_threads(self.device):
            if self._loop is None:
                self._loop = self._build_loop()
            return self._loop(rows.padded(self.size))[: len(rows.models)]

    def sample(self, rows: Rows) -> Sampled:
        """As `denoise`, to be written: on a GPU decoded there, and not waited for."""
        values = self.denoise(rows)
        if self._decoder is None or self._copies is None:
            return SampledBatch(values.cpu())
        with torch.inference_mode():
            tokens = rows.tokens.to(self.device, non_blocking=True)
            return self._copies.start(self._decoder.decode(tokens, values))

    def _build_loop(self) -> "PlainLoop | GPULoop":
        sampling, generator = self.sampling, self.generator
        steps = solver_steps(generator.diffusion.alpha_bar, sampling)
        precision = used_precision(generator, sampling)
        if precision != SamplingPrecision.float32:
            from rpg.sampling.gpu.loop import GPULoop

            return GPULoop(
                generator, steps, sampling.guidance, sampling.temperature, self.size, sampling.clip,
                eight_bits=precision == SamplingPrecision.float8,
            )  # fmt: skip
        return PlainLoop(generator, steps, sampling.guidance, sampling.temperature, sampling.clip)


def check_seed(seed: int) -> None:
    """Raise an `RPGError` for a seed out of range."""
    if not 0 <= seed < 2**64:
        raise RPGError(f"seed: expected 0 <= seed < 2**64, got {seed}")
