"""The loss of a batch and its gradients, together with the other workers, clipped."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rpg.config import Precision
from rpg.generator.generator import Batch, Generator
from rpg.training.arithmetic import arithmetic, rounds_to_bfloat16
from rpg.training.exchange import GradientExchange
from rpg.training.sharding import clip_gradients
from rpg.training.workers import Workers

Objective = Callable[[Generator, Any], tuple[Tensor, Tensor]]
"""What training minimises: for each row of a batch its loss, and how much that counts, both [rows]."""


class Computed(NamedTuple):
    """What a step has computed of its batch, detached."""

    loss: Tensor
    """This worker's share of the batch's loss (their sum over the workers), scalar."""
    gradient_norm: Tensor
    """Of the whole batch, before clipping, scalar."""
    losses: Tensor
    """The loss of each row of this worker, [rows]."""
    weights: Tensor
    """How much they count, [rows]."""


def fitting_loss(generator: Generator, batch: Batch) -> tuple[Tensor, Tensor]:
    """The `Objective` of fitting a generator to checkpoints.

    A checkpoint counts by the number of values sampled of it, so that every value weighs the same.
    """
    return generator.loss(batch), batch.mask.sum((1, 2)).float()


class Gradients:
    """Sets the gradients of a generator's parameters to those of a batch, of all workers' rows together.

    Where products are in bfloat16, so are the gradients of weights, and they are exchanged so.
    """

    def __init__(
        self,
        generator: Generator,
        precision: Precision,
        device: torch.device,
        sharded: bool,
        limit: float,
        objective: Objective = fitting_loss,
    ) -> None:
        """Prepare to compute the gradients of `generator`.

        Args:
            generator: on `device`; all of it, or this worker's share if `sharded`.
            precision: see `arithmetic`.
            device: where batches lie.
            sharded: whether FSDP has split the generator's tensors between the workers.
            limit: largest norm of the gradients; longer ones are scaled.
            objective: what is minimised.
        """
        self._generator = generator
        self._precision = precision
        self._device = device
        self._sharded = sharded
        self._limit = limit
        self._objective = objective
        self._workers = Workers.current()
        self._exchange = None
        if self._workers.count > 1 and not sharded:
            half = rounds_to_bfloat16(precision, device)
            self._exchange = GradientExchange(generator, torch.bfloat16 if half else torch.float32)

    def __call__(self, batch: Any) -> Computed:
        """Set the gradients to those of `batch`, this worker's rows."""
        self._generator.zero_grad(set_to_none=True)
        if self._exchange:
            self._exchange.begin()
        with arithmetic(self._precision, self._device):
            losses, weights = self._objective(self._generator, batch)
            total = self._workers.sum(weights.sum())
            loss = (losses * weights).sum() / total
            # FSDP averages the workers' gradients, but the batch's gradient is their sum.
            torch.autograd.backward(loss * self._workers.count if self._sharded else loss)
        if self._exchange:
            norm = self._exchange.finish(self._limit)
        else:
            norm = clip_gradients(self._generator, self._limit)
        return Computed(loss.detach(), norm, losses.detach(), weights)
