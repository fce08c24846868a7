"""Batches ahead of the step that needs them."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from types import TracebackType

import torch

from rpg.training.batch import Batch, BatchSource

_STEPS_AHEAD = 2
"""Steps that may be queued on a GPU: each holds the memory of its batch."""

_GPU_READERS = 3
"""Batches read at a time for a GPU, whose steps can be shorter than reading one. A CPU has steps to take."""


class Prefetch:
    """Reads the batches of the next steps, and brings them to the device, while the one before is trained on.

    Attributes:
        waited: seconds that `next` spent waiting for data.
    """

    def __init__(self, source: BatchSource, first: int, end: int) -> None:
        """Batches of the steps `first` to `end - 1` of `source`, in order."""
        self.waited = 0.0
        self._source = source
        self._steps = iter(range(first, end))
        self._stream = torch.cuda.Stream(source.device) if source.on_gpu else None
        self._queued: deque[torch.cuda.Event] = deque()
        readers = _GPU_READERS if source.on_gpu else 1
        self._readers = ThreadPoolExecutor(readers)
        self._pending: deque[Future[tuple[Batch, torch.cuda.Event | None]]] = deque()
        for _ in range(readers):
            self._begin()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readers.shutdown(cancel_futures=True)

    def next(self) -> Batch:
        """The batch of the next step, to be used in the device's current stream."""
        self._let_catch_up()
        before = time.perf_counter()
        batch, ready = self._pending.popleft().result()
        self.waited += time.perf_counter() - before
        self._begin()
        if ready is not None:
            current = torch.cuda.current_stream(self._source.device)
            current.wait_event(ready)
            for tensor in batch.tensors():
                tensor.record_stream(current)
        return batch

    def _begin(self) -> None:
        step = next(self._steps, None)
        if step is not None:
            self._pending.append(self._readers.submit(self._read, step))

    def _read(self, step: int) -> tuple[Batch, torch.cuda.Event | None]:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batch = self._source.batch(step)
            return batch, None if self._stream is None else self._stream.record_event()

    def _let_catch_up(self) -> None:
        if self._stream is None:
            return
        self._queued.append(torch.cuda.current_stream(self._source.device).record_event())
        if len(self._queued) > _STEPS_AHEAD:
            self._queued.popleft().synchronize()
