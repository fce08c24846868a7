"""A step's forward and backward pass as one CUDA graph.

A step of a small generator is some hundred kernels of a few microseconds each: starting them one by one takes
several times as long as they do.
"""

import copy

import torch
from torch import Tensor, nn

from rpg.training.batch import Batch
from rpg.training.gradients import Gradients

_WARM_UP = 2
"""Passes before the capture: kernels are compiled and tuned, and libraries take their workspaces."""


class CapturedGradients:
    """`Gradients` as a CUDA graph of what others do, every time on the same memory.

    Gradients are overwritten by the next call, and so is what it returns. All batches have the shapes of the
    first.
    """

    def __init__(self, gradients: Gradients, module: nn.Module) -> None:
        """Capture `gradients`, of the parameters of `module`, at the first call."""
        self.captured = gradients
        self._module = module
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch
        self._results: tuple[Tensor, Tensor, Tensor]

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """See `Gradients`; computes in the current stream."""
        if self._graph is None:
            self._graph = self._capture(batch)
        for target, source in zip(self._batch.tensors(), batch.tensors(), strict=True):
            target.copy_(source)
        self._graph.replay()
        return self._results

    def _capture(self, batch: Batch) -> torch.cuda.CUDAGraph:
        self._batch = copy.deepcopy(batch)
        # BatchNorm counts every pass in training mode.
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
        # What the passes took is free, but not for the graph, which has memory of its own.
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        # Meanwhile another thread may bring the next batch.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._results = self.captured(self._batch)
        return graph
