"""The engine: requests in, tokens of all of them packed into batches, batches sampled, files written.

One core serves every way to generate: `rpg.sampling.generate` steps it until its one request is done, and a
replica of the service lets a thread of its own `run` it. Each step schedules a batch, samples it and hands it
to the writing threads. Requests whose sampling settings are equal share batches, whatever their seeds and
conditions; the others take turns. Tokens are taken model by model, so memory depends on the batch alone
(invariant 3 of docs/architecture.md).
"""

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import torch

from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.batch_sampler import BatchSampler
from rpg.sampling.fair_queue import FairQueue
from rpg.sampling.request import Models, Request, Segment
from rpg.sampling.rows import Rows
from rpg.sampling.writers import LARGE_VALUES, OrderedWriters
from rpg.threads import lower_priority

_KEPT_SAMPLERS = 4
"""Settings whose sampler is kept: on a GPU each holds the denoiser's weights once more, in 16 or 8 bits."""


@dataclass
class EngineStatistics:
    """Sums since the engine began."""

    batches: int = 0
    tokens: int = 0


class Engine:
    """Makes the models of requests with one generator.

    `submit` and `drop` may be called from any thread; `step` or `run` from one thread only.

    Attributes:
        generator: on the device that samples.
        statistics: what was done so far.
        broken: what ended `run`, if anything did.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        large_values: int = LARGE_VALUES,
        in_background: bool = False,
        observe: Callable[[int, int, float], None] = lambda *batch: None,
    ) -> None:
        """Sample on the device where `generator` lies.

        Args:
            generator: what samples.
            large_values: sampled values from which on a model is written by one of several threads.
            in_background: whether `run` and the writing threads have the lowest priority, because others in
                this process and on this machine must answer meanwhile.
            observe: told (rows, places, seconds) of every batch.
        """
        self.generator = generator
        self.statistics = EngineStatistics()
        self.broken: BaseException | None = None
        self._observe = observe
        self._submitted: deque[Request] = deque()
        self._wake = threading.Event()
        self._is_closing = False
        self._requests: dict[str, list[Request]] = {}
        self._turns: FairQueue[str] = FairQueue()
        self._samplers: OrderedDict[str, BatchSampler] = OrderedDict()
        self._in_background = in_background
        self._writers = OrderedWriters(large_values, lower_priority if in_background else None)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._fail_all(error)
        self._close()

    def submit(self, request: Request) -> None:
        """Take up a request; returns at once."""
        if self.broken is not None:
            raise RuntimeError("the engine has stopped") from self.broken
        self._submitted.append(request)
        self._wake.set()

    def drop(self, request: Request) -> None:
        """Stop a request, within the batch that is being sampled; returns at once."""
        request.drop()
        self._wake.set()

    @property
    def jobs(self) -> int:
        """Jobs with tokens to sample."""
        return len(self._requests)

    def step(self) -> bool:
        """Sample one batch and have it written; False if no request wants rows."""
        self._wake.clear()
        self._admit()
        self._remove_done()
        sampler, taken = self._schedule()
        if sampler is None:
            return False
        if taken:
            self._sample(sampler, taken)
        return True

    def run(self) -> None:
        """Step, and wait for requests, until another thread calls `stop`."""
        if self._in_background:
            lower_priority()
        try:
            while not self._is_closing:
                # `stop` may have come while `step` cleared the event that it sets.
                if not self.step() and not self._is_closing:
                    self._wake.wait()
        except BaseException as error:
            self.broken = error
            self._fail_all(RuntimeError(f"sampling ended with {error!r}"))
        finally:
            self._close()

    def stop(self) -> None:
        """End `run` after the batch at hand."""
        self._is_closing = True
        self._wake.set()

    def _admit(self) -> None:
        while self._submitted:
            request = self._submitted.popleft()
            if self.generator.layout.tokens == 0:
                self._write_constants(request)
                continue
            requests = self._requests.setdefault(request.job, [])
            for other in requests:
                # A job is handed out again where whoever asked for it first is gone.
                if not set(other.indices).isdisjoint(request.indices):
                    other.fail_with(RuntimeError("its models were asked for once more"))
            requests.append(request)
            self._turns.join(request.job, request.priority)

    def _write_constants(self, request: Request) -> None:
        """Make the models of a layout without tokens: there is nothing to sample."""
        try:
            for index in request.missing():
                if request.dropped:
                    break
                self._writers.finish(request, index, request.file_for(index, 0))
        except RPGError as error:
            request.fail_with(error)

    def _remove_done(self) -> None:
        for job, requests in list(self._requests.items()):
            requests[:] = [request for request in requests if request.wants_rows]
            if not requests:
                del self._requests[job]
                self._turns.leave(job)

    def _schedule(self) -> tuple[BatchSampler | None, list[Segment | Models]]:
        """What the next batch is made of: the job whose turn it is, and those that may share it."""
        order = self._turns.order()
        if not order:
            return None, []
        settings = self._settings(order[0])
        sampler = self._sampler(order[0])
        taken: list[Segment | Models] = []
        room = sampler.size

        def may_share(job: str) -> bool:
            wants_rows = any(request.wants_rows for request in self._requests[job])
            return wants_rows and self._settings(job) == settings and self._fewest_rows(job, sampler) <= room

        while room and (order := self._turns.order(may_share)):
            peers = self._turns.shares(order[0], may_share)
            share = math.ceil(room / len(peers))
            for job in peers:
                fewest = self._fewest_rows(job, sampler)
                if fewest <= room:
                    rows = self._take(job, sampler, min(max(share, fewest), room), taken)
                    self._turns.served(job, rows)
                    room -= rows
        return sampler, taken

    def _takes_models(self, job: str, sampler: BatchSampler) -> bool:
        """Whether a batch takes whole models of a job, because they are small."""
        return sampler.takes_models and self._writers.take_models(self._requests[job][0])

    def _fewest_rows(self, job: str, sampler: BatchSampler) -> int:
        """The fewest rows that a batch takes of a job: those of a model, or one."""
        return self.generator.layout.tokens if self._takes_models(job, sampler) else 1

    def _take(self, job: str, sampler: BatchSampler, count: int, taken: list[Segment | Models]) -> int:
        takes_models, tokens = self._takes_models(job, sampler), self.generator.layout.tokens
        left = count
        for request in self._requests[job]:
            while left >= (tokens if takes_models else 1) and request.wants_rows:
                try:
                    some: Segment | Models | None
                    if takes_models:
                        some = request.take_models(left // tokens)
                        left -= len(some.indices) * tokens if some is not None else 0
                    else:
                        some = request.take(sampler, left)
                        left -= len(some.rows.tokens) if some is not None else 0
                except RPGError as error:
                    request.fail_with(error)
                    break
                if some is not None:
                    taken.append(some)
        return count - left

    def _sample(self, sampler: BatchSampler, taken: list[Segment | Models]) -> None:
        segments = [each for each in taken if isinstance(each, Segment)]
        models = [each for each in taken if isinstance(each, Models)]
        start = time.monotonic()
        rows = [segment.rows for segment in segments]
        if models:
            rows.append(_rows_of(models, sampler))
        # Giving a GPU more batches before this one has arrived gains nothing: files of ResNet-18's size came
        # at 66 a second so on an H100, and at 51 to 56 with one to four batches ahead.
        sampled = sampler.sample(Rows.joined(rows))
        seconds = time.monotonic() - start
        self._writers.write(segments, models, sampled)
        self.statistics.batches += 1
        self.statistics.tokens += len(sampled)
        self._observe(len(sampled), sampler.size, seconds)

    def _settings(self, job: str) -> str:
        return self._requests[job][0].plan.sampling

    def _sampler(self, job: str) -> BatchSampler:
        plan = self._requests[job][0].plan
        if plan.sampling not in self._samplers:
            self._samplers[plan.sampling] = BatchSampler(self.generator, plan.job.sampling)
            if len(self._samplers) > _KEPT_SAMPLERS:
                self._samplers.popitem(last=False)
        self._samplers.move_to_end(plan.sampling)
        return self._samplers[plan.sampling]

    def _all(self) -> list[Request]:
        return [*self._submitted, *(each for requests in self._requests.values() for each in requests)]

    def _fail_all(self, error: BaseException) -> None:
        for request in self._all():
            request.fail_with(error)

    def _close(self) -> None:
        """Write what was sampled, and leave no unfinished file of any request."""
        try:
            self._writers.close()
        finally:
            for request in self._all():
                request.drop()


def _rows_of(models: Sequence[Models], sampler: BatchSampler) -> Rows:
    indices = [index for each in models for index in each.indices]
    seeds = [each.request.plan.job.seed for each in models for _ in each.indices]
    conditions = torch.cat([each.request.plan.condition_rows(each.indices) for each in models])
    return sampler.rows_of_models(indices, conditions, seeds)
