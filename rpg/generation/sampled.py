"""A sampled batch on its way to the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.generation.model_file import ModelFile


@dataclass
class SampledBatch:
    """Values of sampled tokens, [N, token_size]: on the CPU, or being copied there.

    Attributes:
        decoded: whether `values` are weights, or still normalised values.
    """

    values: Tensor
    decoded: bool
    _copied: torch.cuda.Event | None = None

    def __len__(self) -> int:
        return len(self.values)

    def wait(self) -> None:
        """Return when the values have arrived; from any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def write(self, rows: slice, file: ModelFile, first_token: int) -> None:
        """Write `rows`, consecutive tokens of one model from `first_token` on, into its file.

        Raises:
            RPGError: naming file and tensor, if the weights are not finite.
        """
        self.wait()
        if self.decoded:
            file.write_weights(first_token, self.values[rows])
            return
        for i, values in enumerate(self.values[rows]):
            file.write_token(first_token + i, values)


class HostCopies:
    """Copies from a GPU to the host beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, values: Tensor) -> SampledBatch:
        """Begin to copy weights [N, token_size] to pinned memory."""
        self._stream.wait_stream(torch.cuda.current_stream(values.device))
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        with torch.cuda.stream(self._stream):
            host.copy_(values, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        values.record_stream(self._stream)
        return SampledBatch(host, True, copied)
