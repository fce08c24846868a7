"""One replica's engine: tokens of all models of all waiting jobs share each denoising batch.

The sampling thread owns everything about batches; what comes from elsewhere goes through an inbox or is a
flag. Jobs whose sampling settings are equal share batches, whatever their seeds and conditions; the others
take turns.
"""

import json
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from rpg.config import SamplingConfig
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.batch_sampler import BatchSampler
from rpg.sampling.fair_queue import FairQueue
from rpg.sampling.rows import Rows
from serve.replicas.model_writer import ModelWriter
from serve.replicas.work import Segment, Work

_KEPT_SAMPLERS = 4
"""Settings whose sampler is kept: on a GPU each holds the denoiser's weights once more, in 16 or 8 bits."""


@dataclass
class EngineStatistics:
    """Sums since the engine began."""

    batches: int = 0
    tokens: int = 0
    places: int = 0
    """Rows of all batches, filled or not."""
    sampling_seconds: float = 0.0


class Engine:
    """Samples works on one generator until it is closed.

    Attributes:
        statistics: what was done so far.
        broken: what ended the sampling thread, if anything did.
    """

    def __init__(
        self, generator: Generator, observe: Callable[[int, int, float], None] = lambda *batch: None
    ) -> None:
        """`generator` lies on the device to use; `observe` is told (rows, places, seconds) of every batch."""
        self.generator = generator
        self.statistics = EngineStatistics()
        self.broken: BaseException | None = None
        self._observe = observe
        self._inbox: deque[Work] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._works: dict[str, list[Work]] = {}
        self._turns: FairQueue[str] = FairQueue()
        self._samplers: OrderedDict[str, BatchSampler] = OrderedDict()
        self._writer = ModelWriter()
        self._thread = threading.Thread(target=self._run, name="sample", daemon=True)
        self._thread.start()

    def submit(self, work: Work) -> None:
        """Take up a work; returns at once."""
        if self.broken is not None:
            raise RuntimeError("the engine has stopped") from self.broken
        self._inbox.append(work)
        self._wake.set()

    def drop(self, work: Work) -> None:
        """Stop a work, within the batch that is being denoised; returns at once."""
        work.dropped = True
        self._wake.set()

    @property
    def jobs(self) -> int:
        """Jobs with tokens to sample."""
        return len(self._works)

    def close(self) -> None:
        """Finish the batch at hand and what is to be written of it."""
        self._closing = True
        self._wake.set()
        self._thread.join()
        self._writer.close()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._wake.clear()
                self._admit()
                self._prune()
                sampler, segments = self._next_batch()
                if sampler is None:
                    self._wake.wait()
                elif segments:
                    self._sample(sampler, segments)
        except BaseException as error:
            self.broken = error
            for work in [*self._inbox, *(work for works in self._works.values() for work in works)]:
                work.fail(RuntimeError(f"sampling ended with {error!r}"))

    def _admit(self) -> None:
        while self._inbox:
            work = self._inbox.popleft()
            if self.generator.layout.tokens == 0:
                self._write_constants(work)
                continue
            works = self._works.setdefault(work.job, [])
            for other in works:
                # Whoever asked for it is gone: the job was handed out anew. A file has one writer.
                if not set(other.indices).isdisjoint(work.indices):
                    other.fail(RuntimeError("its models were asked for once more"))
                    self._writer.abandon(other)
            works[:] = [*(other for other in works if not other.dropped), work]
            self._turns.join(work.job, work.priority)

    def _prune(self) -> None:
        for job, works in list(self._works.items()):
            for work in works:
                if work.dropped:
                    self._writer.abandon(work)
            works[:] = [work for work in works if not work.dropped and not work.is_sampled]
            if not works:
                del self._works[job]
                self._turns.leave(job)

    def _next_batch(self) -> tuple[BatchSampler | None, list[Segment]]:
        order = self._turns.order()
        if not order:
            return None, []
        settings = self._settings(order[0])
        sampler = self._sampler(settings, self._works[order[0]][0].plan.job.sampling)
        segments: list[Segment] = []
        room = sampler.size

        def eligible(job: str) -> bool:
            return self._settings(job) == settings and any(self._open(work) for work in self._works[job])

        while room and (order := self._turns.order(eligible)):
            peers = self._turns.shares(order[0], eligible)
            share = math.ceil(room / len(peers))
            for job in peers:
                taken = self._take(job, sampler, min(share, room), segments)
                self._turns.served(job, taken)
                room -= taken
        return sampler, segments

    def _take(self, job: str, sampler: BatchSampler, count: int, segments: list[Segment]) -> int:
        left = count
        for work in self._works[job]:
            while left and self._open(work):
                try:
                    segment = work.take(sampler, left)
                except RPGError as error:
                    work.fail(error)
                    break
                if segment is None:
                    break
                segments.append(segment)
                left -= len(segment.rows.tokens)
        return count - left

    def _write_constants(self, work: Work) -> None:
        """Make the models of a layout without tokens: there is nothing to sample."""
        try:
            for index in work.indices:
                with work.plan.file(index, work.out) as file:
                    digest = file.sha256()
                work.made(index, file, digest)
        except (RPGError, OSError) as error:
            work.fail(error)

    @staticmethod
    def _open(work: Work) -> bool:
        return not work.dropped and not work.is_sampled

    def _sample(self, sampler: BatchSampler, segments: list[Segment]) -> None:
        start = time.monotonic()
        rows = Rows.joined([segment.rows for segment in segments])
        sampled = sampler.sample(rows)
        # Not one batch ahead of the GPU: a job that is cancelled would go on for so long.
        sampled.wait()
        seconds = time.monotonic() - start
        self._writer.write(segments, sampled)
        self.statistics.batches += 1
        self.statistics.tokens += len(sampled)
        self.statistics.places += sampler.size
        self.statistics.sampling_seconds += seconds
        self._observe(len(sampled), sampler.size, seconds)

    def _settings(self, job: str) -> str:
        return json.dumps(asdict(self._works[job][0].plan.job.sampling))

    def _sampler(self, settings: str, sampling: SamplingConfig) -> BatchSampler:
        if settings not in self._samplers:
            self._samplers[settings] = BatchSampler(self.generator, sampling)
            if len(self._samplers) > _KEPT_SAMPLERS:
                self._samplers.popitem(last=False)
        self._samplers.move_to_end(settings)
        return self._samplers[settings]


def device_of(num_gpus: float) -> torch.device:
    """Where a replica's generator runs."""
    return torch.device("cuda" if num_gpus else "cpu")
