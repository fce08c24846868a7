"""A sampled batch on its way to the host."""

from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from rpg.generation.model_file import ModelFile

_PART_BYTES = 8 * 2**20
"""A file is written in parts of about so much by several threads: copying into the page cache is what takes
time, and one thread copies more slowly than a GPU samples."""
_WRITING_THREADS = 4


@dataclass
class SampledBatch:
    """Normalised values of sampled tokens, [N, token_size], on the CPU."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def wait(self) -> None:
        """Nothing to wait for."""

    def write(self, rows: slice, file: ModelFile, first_token: int) -> None:
        """Write `rows`, consecutive tokens of one model from `first_token` on, into its file.

        Raises:
            RPGError: naming file and tensor, if the weights are not finite.
        """
        for i, values in enumerate(self.values[rows]):
            file.write_token(first_token + i, values)


@dataclass
class ArrivingBatch:
    """Weights of sampled tokens, float32 [N, token_size], being copied from a GPU to the host."""

    weights: Tensor
    finite: Tensor
    """Bool [N]: rows without NaN or infinite values."""
    copied: torch.cuda.Event

    def __len__(self) -> int:
        return len(self.weights)

    def wait(self) -> None:
        """Return when all has arrived; from any thread."""
        self.copied.synchronize()

    def write(self, rows: slice, file: ModelFile, first_token: int) -> None:
        """As `SampledBatch.write`."""
        self.wait()
        weights, finite = self.weights[rows], self.finite[rows]
        size = max(1, _PART_BYTES // (weights.shape[1] * weights.element_size()))
        if len(weights) <= size:
            file.write_weights(first_token, weights, finite)
            return
        parts = zip(range(0, len(weights), size), weights.split(size), finite.split(size), strict=True)
        futures = [
            _writers().submit(file.write_weights, first_token + start, *part) for start, *part in parts
        ]
        # The file may be closed after a failure, so none must be left at work.
        wait(futures)
        for future in futures:
            future.result()


Sampled = SampledBatch | ArrivingBatch


@cache
def _writers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_WRITING_THREADS, thread_name_prefix="write")


class HostCopies:
    """Copies from a GPU to the host beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, weights: Tensor) -> ArrivingBatch:
        """Begin to copy weights [N, token_size] to pinned memory."""
        self._stream.wait_stream(torch.cuda.current_stream(weights.device))
        host = torch.empty(weights.shape, dtype=weights.dtype, pin_memory=True)
        finite = torch.empty(len(weights), dtype=torch.bool, pin_memory=True)
        with torch.cuda.stream(self._stream):
            host.copy_(weights, non_blocking=True)
            finite.copy_(weights.isfinite().all(1), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        weights.record_stream(self._stream)
        return ArrivingBatch(host, finite, copied)
