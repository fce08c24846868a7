"""The loss of a batch and its gradients: the other workers' share, and one CUDA graph."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rpg.config import Precision
from rpg.generator.generator import Batch, Generator
from rpg.training.arithmetic import arithmetic
from rpg.training.workers import Workers

Objective = Callable[[Generator, Any], tuple[Tensor, Tensor]]
"""What training minimises: for each row of a batch its loss, and how much that counts, both [rows]."""

Gradients = Callable[[Any], tuple[Tensor, Tensor, Tensor]]
"""Sets the gradients of a generator's parameters to those of a batch.

Returns, detached: this worker's share of the batch's loss (their sum over the workers), scalar; and for each
row of this worker its loss and how much that counts, both [rows].
"""

_WARM_UP = 2
"""Passes before a graph is captured. They compile and tune kernels, and libraries allocate workspaces."""


def fitting_loss(generator: Generator, batch: Batch) -> tuple[Tensor, Tensor]:
    """The `Objective` of fitting a generator to checkpoints.

    A checkpoint counts by the number of values sampled of it, so that every value weighs the same.
    """
    return generator.loss(batch), batch.mask.sum((1, 2)).float()


class EagerGradients:
    """Computes `Gradients` kernel by kernel, together with other workers where there are any."""

    def __init__(
        self,
        generator: Generator,
        precision: Precision,
        device: torch.device,
        sharded: bool,
        objective: Objective = fitting_loss,
    ) -> None:
        """Prepare to compute the gradients of `generator`.

        Args:
            generator: on `device`; all of it, or this worker's share if `sharded`.
            precision: see `arithmetic`.
            device: where batches lie.
            sharded: whether FSDP has split the generator's tensors between the workers.
            objective: what is minimised.
        """
        self._generator = generator
        self._precision = precision
        self._device = device
        self._workers = Workers.current()
        self._losses: nn.Module = _Losses(generator, objective)
        if self._workers.count > 1 and not sharded:
            # Every worker computes the same buffers, so they need no broadcast.
            self._losses = DistributedDataParallel(self._losses, broadcast_buffers=False)

    def __call__(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Set the gradients to those of `batch`; `Gradients` says what is returned."""
        self._generator.zero_grad(set_to_none=True)
        with arithmetic(self._precision, self._device):
            losses, weights = self._losses(batch)
            total = self._workers.sum(weights.sum())
            loss = (losses * weights).sum() / total
            # PyTorch averages the workers' gradients, but the batch's gradient is their sum.
            torch.autograd.backward(loss * self._workers.count if self._workers.count > 1 else loss)
        return loss.detach(), losses.detach(), weights


class CapturedGradients:
    """Replays other `Gradients` as one CUDA graph, which is captured at the first call.

    A step of a small generator is some hundred kernels of a few microseconds each, and starting them one by
    one takes several times as long as they run.

    A graph works on fixed memory. So every batch is copied into the first one's tensors and must have their
    shapes, and every call overwrites the gradients and the results of the call before.
    """

    def __init__(self, gradients: Gradients, module: nn.Module) -> None:
        """Prepare to capture `gradients`, which are those of the parameters of `module`."""
        self.captured = gradients
        self._module = module
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch
        self._results: tuple[Tensor, Tensor, Tensor]

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Set the gradients to those of `batch`, in the current stream; `Gradients` says what is returned."""
        if self._graph is None:
            self._graph = self._capture(batch)
        for target, source in zip(self._batch.tensors(), batch.tensors(), strict=True):
            target.copy_(source)
        self._graph.replay()
        return self._results

    def _capture(self, batch: Batch) -> torch.cuda.CUDAGraph:
        self._batch = copy.deepcopy(batch)
        # BatchNorm's buffers change with every pass in training mode, but the warm-up must leave no trace.
        before = [buffer.clone() for buffer in self._module.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self.captured(self._batch)
        self._module.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, value in zip(self._module.buffers(), before, strict=True):
            buffer.copy_(value)
        # The graph allocates from a pool of its own, which cannot use what the warm-up left in PyTorch's
        # cache.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Another thread may be bringing the next batch to the GPU, which must not end the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._results = self.captured(self._batch)
        return graph


class _Losses(nn.Module):
    """An objective as the module call that PyTorch's data parallelism expects."""

    def __init__(self, generator: Generator, objective: Objective) -> None:
        super().__init__()
        self.generator = generator
        self.objective = objective

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        return self.objective(self.generator, batch)
