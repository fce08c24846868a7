"""The batches of training: a pure function of (seed, step), so that a resumed run sees the same; read ahead.

A row of a batch is one checkpoint's tokens. Every few rows have random numbers of their own, so a worker
draws little but those of its own rows, and together the workers see the batch that one worker would see.
"""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from rpg.collection.retokenised import AnyShards
from rpg.config import TrainConfig
from rpg.generator.generator import Batch
from rpg.seeds import derived_seed
from rpg.training.workers import Workers

_STEPS_AHEAD = 2
"""Steps that may be queued on a GPU: each holds the memory of its batch."""

_GPU_READERS = 3
"""Batches read at the same time for a GPU, whose steps can be shorter than reading one. For a CPU one is
read, since the processor has to compute the steps."""

_ROWS_TOGETHER = {"cpu": 1, "cuda": 16}
"""Rows whose random numbers come from one generator, by kind of device. On a GPU, making a generator and
starting a kernel for each row takes a thread longer than a step of a small generator, and holds up the thread
that starts steps. On a CPU drawing takes the time, and a worker is to draw no other worker's rows."""


class AnyBatch(Protocol):
    """What a training step is computed from."""

    def tensors(self) -> list[Tensor]:
        """All its tensors."""
        ...


class Source(Protocol):
    """Where the batches of training come from.

    Attributes:
        device: where they lie.
        on_gpu: whether that is a GPU.
        readers: how many of them may be made at the same time, each by a thread of its own.
        tokens_per_step: tokens in the batches of all workers together.
    """

    device: torch.device
    on_gpu: bool
    readers: int
    tokens_per_step: int

    def batch(self, step: int) -> Any:
        """This worker's part of the batch of step number `step`, an `AnyBatch`."""
        ...


class BatchSource:
    """Draws batches from a sharded collection; reads the sampled tokens and no others.

    Tokens go to a GPU in the type that they are stored in and become float32 there, and the mask is computed
    there. This halves the traffic for tokens of 16 bits and leaves the processor less work.
    """

    def __init__(
        self,
        shards: AnyShards,
        conditions: Tensor,
        config: TrainConfig,
        seed: int,
        timesteps: int,
        condition_dropout: float,
        workers: Workers,
        device: torch.device,
    ) -> None:
        """Draw from `shards`.

        Args:
            shards: the training checkpoints.
            conditions: one row a checkpoint, in the form that the generator's condition takes.
            config: batch sizes, of all workers together.
            seed: of the run.
            timesteps: of the diffusion.
            condition_dropout: share of conditions to drop.
            workers: tells which rows this process draws.
            device: of the batches. It also draws the noise, which is most of the random numbers; a GPU and a
                CPU draw different numbers.

        Raises:
            RPGError: if there are fewer rows than workers.
        """
        self.shards = shards
        self.conditions = conditions
        self.seed = seed
        self.timesteps = timesteps
        self.condition_dropout = condition_dropout
        self.checkpoints_per_step = config.checkpoints_per_step
        self.tokens_per_checkpoint = min(config.tokens_per_checkpoint, shards.layout.tokens)
        self.lengths = shards.layout.lengths().int()
        self.rows = workers.rows(config.checkpoints_per_step)
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.readers = _GPU_READERS if self.on_gpu else 1
        self.tokens_per_step = self.checkpoints_per_step * self.tokens_per_checkpoint
        together = _ROWS_TOGETHER[device.type]
        self._blocks_per_step = -(-self.checkpoints_per_step // together)
        # The rows of each block in which some are this worker's.
        self._blocks = {
            block: range(block * together, min((block + 1) * together, self.checkpoints_per_step))
            for block in range(self.rows.start // together, -(-self.rows.stop // together))
        }

    def batch(self, step: int) -> Batch:
        """This worker's rows of the batch of step number `step`, on the source's device.

        On a GPU the copies may still be running in its current stream.
        """
        random = torch.Generator().manual_seed(derived_seed(self.seed, "step", step))
        count, rows = self.checkpoints_per_step, slice(self.rows.start, self.rows.stop)
        checkpoints = self._checkpoints(step)[rows]
        # One timestep a checkpoint, stratified over the batch, so that every step sees all levels of noise.
        level = (torch.arange(count) + torch.rand(count, generator=random)) / count
        t = (level * self.timesteps).long().clamp(max=self.timesteps - 1)[rows]
        dropped = None
        if self.condition_dropout:
            dropped = (torch.rand(count, generator=random) < self.condition_dropout)[rows]
        indices = self._orders(step)
        stored = self.shards.read_batch(checkpoints.tolist(), indices.numpy(), pinned=self.on_gpu)
        tokens = stored.to(self.device, non_blocking=True).float()
        lengths = self._moved(self.lengths[indices])
        places = torch.arange(tokens.shape[-1], dtype=torch.int32, device=self.device)
        mask = places < lengths[..., None]
        return Batch(
            tokens,
            mask,
            self._moved(indices),
            self._moved(self.conditions[checkpoints]),
            self._moved(t),
            self._noise(step, tokens.shape),
            None if dropped is None else self._moved(dropped),
        )

    def _moved(self, values: Tensor) -> Tensor:
        if not self.on_gpu:
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    def _orders(self, step: int) -> Tensor:
        """Which tokens of its checkpoint each row of this worker holds, int64 [rows, tokens]."""
        tokens, found = self.shards.layout.tokens, []
        for block, rows in self._blocks.items():
            random = self._random("tokens", step, block, torch.device("cpu"))
            orders = [torch.randperm(tokens, generator=random)[: self.tokens_per_checkpoint] for _ in rows]
            found += [order for order, row in zip(orders, rows, strict=True) if row in self.rows]
        return torch.stack(found)

    def _noise(self, step: int, shape: torch.Size) -> Tensor:
        """Standard normal values for this worker's rows."""
        noise = torch.empty(shape, device=self.device)
        for block, rows in self._blocks.items():
            random = self._random("noise", step, block, self.device)
            first, end = max(rows.start, self.rows.start), min(rows.stop, self.rows.stop)
            target = noise[first - self.rows.start : end - self.rows.start]
            if len(target) == len(rows):
                torch.randn(target.shape, generator=random, out=target)
            else:
                drawn = torch.randn(len(rows), *shape[1:], generator=random, device=self.device)
                target.copy_(drawn[first - rows.start : end - rows.start])
        return noise

    def _random(self, purpose: str, step: int, block: int, device: torch.device) -> torch.Generator:
        seed = derived_seed(self.seed, purpose, step * self._blocks_per_step + block)
        return torch.Generator(device).manual_seed(seed)

    def _checkpoints(self, step: int) -> Tensor:
        """The checkpoints of a step: consecutive places in an endless sequence of shuffled epochs."""
        total = len(self.shards)
        places = step * self.checkpoints_per_step + torch.arange(self.checkpoints_per_step)
        epochs = places // total
        chosen = [
            epoch_order(self.seed, int(epoch), total)[places[epochs == epoch] % total]
            for epoch in torch.unique(epochs)
        ]
        checkpoints = torch.cat(chosen)
        shuffle = torch.Generator().manual_seed(derived_seed(self.seed, "order", step))
        return checkpoints[torch.randperm(len(checkpoints), generator=shuffle)]


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, total: int) -> Tensor:
    """The order of `total` checkpoints in an epoch, int64 [total]."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "epoch", epoch))
    return torch.randperm(total, generator=generator)


class Prefetch:
    """Reads the batches of the next steps and brings them to the device while a step is computed.

    Attributes:
        waited: seconds that `next` spent waiting for data.
    """

    def __init__(self, source: Source, first: int, end: int) -> None:
        """Batches of the steps `first` to `end - 1` of `source`, in order."""
        self.waited = 0.0
        self._source = source
        self._steps = iter(range(first, end))
        self._stream = torch.cuda.Stream(source.device) if source.on_gpu else None
        self._queued: deque[torch.cuda.Event] = deque()
        self._readers = ThreadPoolExecutor(source.readers)
        self._pending: deque[Future[tuple[Any, torch.cuda.Event | None]]] = deque()
        for _ in range(source.readers):
            self._begin()

    def __enter__(self) -> "Prefetch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._readers.shutdown(cancel_futures=True)

    def next(self) -> Any:
        """The batch of the next step, for use in the device's current stream."""
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

    def _read(self, step: int) -> tuple[Any, torch.cuda.Event | None]:
        with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            batch = self._source.batch(step)
            return batch, None if self._stream is None else self._stream.record_event()

    def _let_catch_up(self) -> None:
        if self._stream is None:
            return
        self._queued.append(torch.cuda.current_stream(self._source.device).record_event())
        if len(self._queued) > _STEPS_AHEAD:
            self._queued.popleft().synchronize()
