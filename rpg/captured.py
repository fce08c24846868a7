"""A step of training as one CUDA graph."""

import copy
import os
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor


class HasTensors(Protocol):
    """What a step is taken on."""

    def tensors(self) -> list[Tensor]:
        """All its tensors."""
        ...


Batch = TypeVar("Batch", bound=HasTensors)
Computed = TypeVar("Computed")

_STEPS_BEFORE = 2
"""Steps that are taken kernel by kernel before one is captured. They compile and tune kernels, and libraries,
NCCL and the optimiser allocate what they need."""


class CapturedStep(Generic[Batch, Computed]):
    """Takes a step by replaying it as one CUDA graph, which is captured at the third call.

    A step of small networks is some hundred kernels of a few microseconds each, and starting them one by one
    takes several times as long as they run. Where several processes exchange gradients, the exchange is part
    of the graph, so all of them capture the same step.

    A graph works on fixed memory. So every batch is copied into the first one's tensors and must have their
    shapes, and every call overwrites what the call before has computed.
    """

    def __init__(
        self,
        step: Callable[[Batch], Computed],
        device: torch.device,
        free: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare to capture a step.

        Args:
            step: works on `device` and calls nothing that waits for it.
            device: a GPU.
            free: called before the capture, to give up memory that steps have left behind: the graph
                allocates from a pool of its own, which cannot use it.
        """
        # NCCL would register the buffers of a graph, which fails where PyTorch's blocks of memory may grow
        # (pytorch/pytorch#158029).
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
        self.captured = step
        self._free = free
        self._stream = torch.cuda.Stream(device)
        self._steps = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch
        self._computed: Computed

    def __call__(self, batch: Batch) -> Computed:
        """Take the step of `batch`, in the current stream."""
        if self._graph is None:
            self._steps += 1
            if self._steps <= _STEPS_BEFORE:
                return self._in_own_stream(batch)
            self._graph = self._capture(batch)
        for target, source in zip(self._batch.tensors(), batch.tensors(), strict=True):
            target.copy_(source)
        self._graph.replay()
        return self._computed

    def release(self) -> None:
        """Forget the graph: while one with its collectives is there, a process group cannot be destroyed."""
        if self._graph is not None:
            torch.cuda.synchronize(self._stream.device)
            self._graph.reset()
            self._graph = None
            # Another process group starts NCCL in its first steps, which cannot be captured.
            self._steps = 0

    def _in_own_stream(self, batch: Batch) -> Computed:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            computed = self.captured(batch)
        current.wait_stream(self._stream)
        return computed

    def _capture(self, batch: Batch) -> torch.cuda.CUDAGraph:
        self._batch = copy.deepcopy(batch)
        self._free()
        graph = torch.cuda.CUDAGraph()
        # Another thread may be bringing the next batch to the GPU, which must not end the capture.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._computed = self.captured(self._batch)
        return graph
