"""One denoising batch: rows of any models, jobs and conditions that are sampled with the same settings.

Batches always hold the same number of rows, and a model's noise and prototypes are computed in ways that do
not depend on its neighbours. So a model comes out the same whatever it is batched with (invariant 2 of
docs/architecture.md).

On a CPU this needs two precautions, since a row's bits may depend on where in the batch it lies. PyTorch's
vectorised functions (SiLU, ELU) round differently in the remainder behind the last full vector, so the number
of rows is a multiple of two vectors, which leaves no remainder. Threads leave remainders of their own, and
MKL multiplies a thread's share with a kernel that suits its size, so sampling uses one thread. Workers use
more of a machine's CPUs, and a model does not depend on how many there are.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.config import SamplingConfig, SamplingPrecision, validate_sampling
from rpg.generator.generator import Generator
from rpg.sampling.gpu.results import SampledWeights, TokenDecoder
from rpg.sampling.model_writer import ModelWriter
from rpg.sampling.noise import seed_word
from rpg.sampling.plain_loop import PlainLoop
from rpg.sampling.precision import used_precision
from rpg.sampling.prototypes import ROW_MULTIPLE, Prototypes, sampling_threads
from rpg.sampling.rows import Rows
from rpg.sampling.solvers import generator_steps

if TYPE_CHECKING:
    from rpg.sampling.gpu.loop import GPULoop


class Sampled(Protocol):
    """A sampled batch, on the host."""

    def __len__(self) -> int:
        """Rows of the batch."""
        ...

    def write(self, rows: slice, file: ModelWriter, first_token: int) -> None:
        """Write `rows`, consecutive tokens of one model from `first_token` on, into its file.

        Raises:
            RPGError: naming the file, if it cannot be written or the weights are not finite.
        """
        ...

    def models(self, rows: slice, layout: Layout) -> dict[str, Tensor]:
        """The weights of M models that `rows`, all their tokens one after the other, belong to.

        Returns:
            By name, of each tensor that is tokens: [M, numel], in the tensor's dtype.
        """
        ...


@dataclass
class SampledValues:
    """Normalised values of sampled tokens, float32 [N, token_size], on the host."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def write(self, rows: slice, file: ModelWriter, first_token: int) -> None:
        """Decode and write `rows`, as `Sampled` describes."""
        for i, values in enumerate(self.values[rows]):
            file.write_token(first_token + i, values)

    def models(self, rows: slice, layout: Layout) -> dict[str, Tensor]:
        """Decode the models of `rows`, as `Sampled` describes."""
        return layout.decode_many(self.values[rows].view(-1, layout.tokens, layout.token_size))


class BatchSampler:
    """Samples batches of rows from one generator, on its device.

    Attributes:
        generator: in evaluation mode.
        size: rows that every batch is filled up to.
        takes_models: whether models are so small that a batch takes whole ones.
    """

    def __init__(self, generator: Generator, sampling: SamplingConfig) -> None:
        """Sample from `generator` where it lies.

        Raises:
            RPGError: naming the setting that is out of range or does not fit the generator.
        """
        validate_sampling(sampling, generator.config)
        self.generator = generator.eval()
        self.size = -(-sampling.token_batch // ROW_MULTIPLE) * ROW_MULTIPLE
        self._sampling = sampling
        self._device = generator.positions.device
        self._prototypes = Prototypes(generator, sampling)
        self.takes_models = self._prototypes.has_one_piece and generator.layout.tokens <= self.size
        self._loop: PlainLoop | GPULoop | None = None
        decodes_on_gpu = self._device.type == "cuda" and TokenDecoder.serves(generator.layout)
        self._decoder = TokenDecoder(generator.layout, self._device) if decodes_on_gpu else None

    def rows(self, model: int, condition: Tensor, seed: int) -> Iterator[Rows]:
        """The rows of one model, piece by piece, in order of its tokens.

        Args:
            model: its index in its job.
            condition: a row as the generator's condition takes it (`rpg.generator.condition`).
            seed: of the job, 0 <= seed < 2**64.
        """
        start = 0
        for prototypes, unconditional in self._prototypes.pieces(condition):
            tokens = torch.arange(start, start + len(prototypes))
            models = torch.full_like(tokens, model)
            yield Rows(torch.full_like(tokens, seed_word(seed)), models, tokens, prototypes, unconditional)
            start += len(prototypes)

    def rows_of_models(self, models: Sequence[int], conditions: Tensor, seeds: Sequence[int]) -> Rows:
        """All rows of several models, one after the other, where `takes_models`.

        Args:
            models: their indices in their jobs.
            conditions: a row for each, as in `rows`.
            seeds: of their jobs.
        """
        count = self.generator.layout.tokens
        tokens = torch.arange(count).repeat(len(models))
        numbers = torch.tensor(models).repeat_interleave(count)
        words = torch.tensor([seed_word(seed) for seed in seeds]).repeat_interleave(count)
        return Rows(words, numbers, tokens, *self._prototypes.of_models(conditions))

    def denoise(self, rows: Rows) -> Tensor:
        """Sample the tokens of at most `size` rows: normalised values, float32 [N, token_size]."""
        with torch.inference_mode(), sampling_threads(self._device):
            if self._loop is None:
                self._loop = self._build_loop()
            return self._loop(rows.padded(self.size))[: len(rows.models)]

    def sample(self, rows: Rows) -> Sampled:
        """Sample at most `size` rows to be written."""
        values = self.denoise(rows)
        if self._decoder is None:
            return SampledValues(values.cpu())
        with torch.inference_mode():
            tokens = rows.tokens.to(self._device, non_blocking=True)
            return SampledWeights.from_gpu(self._decoder.decode(tokens, values))

    def _build_loop(self) -> "PlainLoop | GPULoop":
        sampling, generator = self._sampling, self.generator
        steps = generator_steps(generator, sampling)
        precision = used_precision(generator, sampling)
        if precision != SamplingPrecision.float32:
            from rpg.sampling.gpu.loop import GPULoop

            return GPULoop(
                generator, steps, sampling.guidance, sampling.temperature, self.size, sampling.clip,
                float8=precision == SamplingPrecision.float8,
            )  # fmt: skip
        return PlainLoop(generator, steps, sampling.guidance, sampling.temperature, sampling.clip)
