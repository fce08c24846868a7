"""The loss of a batch and its gradients."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rpg.config import Precision
from rpg.generator.generator import Generator
from rpg.training.batch import Batch
from rpg.training.precision import arithmetic
from rpg.training.workers import Workers

Gradients = Callable[[Batch], tuple[Tensor, Tensor, Tensor]]
"""Leaves the gradients of a batch, and of no other, in a generator's parameters.

Returns, detached: this worker's share of the batch's loss (their sum over the workers), scalar; and for each
row of this worker its loss and how much that counts, both [rows].
"""


class PlainGradients:
    """`Gradients` in operations that are started one by one, with other workers where there are any."""

    def __init__(
        self, generator: Generator, precision: Precision, device: torch.device, sharded: bool
    ) -> None:
        """Of `generator`, which lies on `device`, a share of it if `sharded`."""
        self._generator = generator
        self._precision = precision
        self._device = device
        self._workers = Workers.current()
        self._losses: Callable[..., Tensor] = generator.loss
        if self._workers.count > 1 and not sharded:
            # Buffers are the same everywhere already.
            self._losses = DistributedDataParallel(_Losses(generator), broadcast_buffers=False)

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """See `Gradients`."""
        # Checkpoints count by the values sampled of them, so that every value weighs the same.
        weights = batch.mask.sum((1, 2)).float()
        total = self._workers.sum(weights.sum())
        self._generator.zero_grad(set_to_none=True)
        with arithmetic(self._precision, self._device):
            losses = self._losses(
                batch.tokens, batch.mask, batch.indices, batch.condition, batch.t, batch.noise, batch.dropped
            )
            loss = (losses * weights).sum() / total
            # Workers' gradients are averaged, where the batch's is their sum.
            torch.autograd.backward(loss * self._workers.count if self._workers.count > 1 else loss)
        return loss.detach(), losses.detach(), weights


class _Losses(nn.Module):
    """A generator's loss as the module call that PyTorch's data parallelism expects."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, *batch: Tensor | None) -> Tensor:
        losses: Tensor = self.generator.loss(*batch)  # type: ignore[arg-type]
        return losses
