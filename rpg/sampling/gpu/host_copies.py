"""Sampled weights on their way from a GPU to the host, beside what the GPU computes next."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.sampling.model_writer import ModelWriter


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

    def write(self, rows: slice, file: ModelWriter, first_token: int) -> None:
        """Write `rows`, consecutive tokens of one model from `first_token` on, into its file.

        Raises:
            RPGError: as `ModelWriter.write_weights`.
        """
        self.wait()
        file.write_weights(first_token, self.weights[rows], self.finite[rows])


class HostCopies:
    """Copies from a GPU to pinned memory of the host, in a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, weights: Tensor) -> ArrivingBatch:
        """Begin to copy weights [N, token_size]; returns at once."""
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
