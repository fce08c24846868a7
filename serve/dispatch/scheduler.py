"""Scheduling: the jobs of one generator take turns, and its replicas get their models in leases.

A lease is not written down. When a replica is lost, its models are handed out again, and when the dispatcher
itself is lost, the next one starts from what is on storage.
"""

import asyncio
import logging
import math
import time
from contextlib import aclosing
from typing import Protocol

from rpg.client.schema import JobState
from rpg.sampling.fair_queue import FairQueue
from serve.dispatch.lease import GeneratorReport, Lease, Replicas
from serve.dispatch.live_job import LiveJob
from serve.dispatch.records import Made
from serve.dispatch.served_generator import ServedGenerator
from serve.metrics import JobMetrics

MAX_LOST_REPLICAS = 10
"""When a job has lost so many replicas and no model was made in between, the job is taken for the reason."""

_LEASES_PER_REPLICA_OF_A_JOB = 4
"""Some are sampled, some wait for it, some are being written."""
_LEASES_PER_REPLICA = 64
_BATCHES_PER_LEASE = 16
_SPEED_SECONDS = 1.0
"""Speed is measured over at least so long."""

_log = logging.getLogger("ray.serve")


class JobRecorder(Protocol):
    """Whoever writes down how far jobs are."""

    async def save(self, job: LiveJob) -> None:
        """Write a job's state to storage."""
        ...

    async def end(self, job: LiveJob, state: JobState, error: str | None = None) -> None:
        """End a job with `state`, and with `error` where it failed."""
        ...


class GeneratorScheduler:
    """The jobs of one generator; between `start` and `stop` its replicas are given their models.

    Attributes:
        served: the generator.
        report: what a replica has told of it, once one has.
        replicas: its replicas, once it has started.
        speed: models a second, measured while jobs ran.
    """

    def __init__(
        self,
        served: ServedGenerator,
        recorder: JobRecorder,
        metrics: JobMetrics,
        max_lost_replicas: int = MAX_LOST_REPLICAS,
    ) -> None:
        self.served = served
        self.report: GeneratorReport | None = None
        self.replicas: Replicas | None = None
        self.speed: float | None = None
        self._recorder = recorder
        self._metrics = metrics
        self._max_lost_replicas = max_lost_replicas
        self._queue: FairQueue[LiveJob] = FairQueue()
        self._wake = asyncio.Event()
        self._leases: set[asyncio.Task[None]] = set()
        self._made_since: tuple[float, int] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, replicas: Replicas) -> None:
        """Begin to hand out models to `replicas`."""
        self.replicas = replicas
        self._task = asyncio.create_task(self._run(replicas))

    async def stop(self) -> None:
        """Hand out nothing more; models that replicas had not finished wait again."""
        tasks = [*self._leases, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def failure(self) -> str | None:
        """The error that has ended scheduling; None while it goes on."""
        if self._task is None or not self._task.done() or self._task.cancelled():
            return None
        return repr(self._task.exception())

    def add(self, job: LiveJob) -> None:
        """Let a job take turns."""
        job.note = None
        self._queue.join(job, job.manifest.priority)
        self._wake.set()

    def remove(self, job: LiveJob) -> None:
        """Let a job take no more turns."""
        self._queue.leave(job)

    def measure(self, queued: int) -> None:
        """Update speed and metrics, now and then; `queued` models are asked for and not made."""
        self._metrics.queued(self.served.name, queued)
        if self._made_since is not None:
            start, count = self._made_since
            seconds = time.monotonic() - start
            if count and seconds >= _SPEED_SECONDS:
                self.speed = count / seconds
                self._made_since = None

    async def _run(self, replicas: Replicas) -> None:
        self.report = await self._first_report(replicas)
        max_leases = _LEASES_PER_REPLICA * self.served.max_replicas
        while True:
            self._wake.clear()
            while len(self._leases) < max_leases and (job := self._next_job()) is not None:
                await self._hand_out(job, replicas, self.report)
            await self._wake.wait()

    async def _first_report(self, replicas: Replicas) -> GeneratorReport:
        while True:
            try:
                return await replicas.describe()
            except Exception as error:
                _log.warning("generator %s: no replica answers: %s", self.served.name, last_line(error))
                await asyncio.sleep(1)

    def _next_job(self) -> LiveJob | None:
        max_leases = _LEASES_PER_REPLICA_OF_A_JOB * self.served.max_replicas
        order = self._queue.order(lambda job: job.has_waiting_models and len(job.leases) < max_leases)
        return order[0] if order else None

    async def _hand_out(self, job: LiveJob, replicas: Replicas, report: GeneratorReport) -> None:
        if job.progress.digest != report.digest:
            if job.progress.made and job.progress.digest is not None:
                await self._fail(
                    job,
                    f"generator '{self.served.name}' was replaced by another version "
                    "while the job was under way",
                )
                return
            job.progress.digest = report.digest
            # The digest is saved before a model is made, because all models must come from one generator, and
            # some may be made after a crash.
            await self._recorder.save(job)
            if job.has_ended:
                return
        rows = _BATCHES_PER_LEASE * job.manifest.job.sampling.token_batch
        models = job.take(max(1, math.ceil(rows / max(1, report.tokens))))
        if not models:
            return
        lease = Lease(job.id, job.manifest.priority, report.digest, models)
        self._queue.served(job, len(models))
        task = asyncio.create_task(self._run_lease(job, replicas, lease))
        job.leases.add(task)
        self._leases.add(task)
        task.add_done_callback(lambda done: self._forget_lease(job, done))

    def _forget_lease(self, job: LiveJob, task: "asyncio.Task[None]") -> None:
        job.leases.discard(task)
        self._leases.discard(task)
        self._wake.set()

    async def _run_lease(self, job: LiveJob, replicas: Replicas, lease: Lease) -> None:
        left = set(lease.models)
        failure: str | None = None
        try:
            async with aclosing(replicas.make(lease)) as events:  # type: ignore[type-var]
                async for event in events:
                    if job.has_ended:
                        break
                    if isinstance(event, str):
                        failure = event
                        break
                    self._record(job, event)
                    left -= {made.model for made in event}
        except Exception as error:
            job.losses += 1
            why = last_line(error)
            _log.warning("job %s: a replica of %s was lost: %s", job.id, self.served.name, why)
            if job.losses >= self._max_lost_replicas:
                failure = f"{job.losses} replicas were lost at it, one after the other: {why}"
            else:
                await asyncio.sleep(min(5.0, 0.2 * 2**job.losses))
        finally:
            if not job.has_ended:
                job.put_back(left)
        if job.has_ended:
            return
        if failure is not None:
            await self._fail(job, failure)
        elif not job.remaining:
            await self._recorder.end(job, JobState.succeeded)

    async def _fail(self, job: LiveJob, why: str) -> None:
        _log.error("job %s failed: %s", job.id, why)
        await self._recorder.end(job, JobState.failed, why)

    def _record(self, job: LiveJob, made: list[Made]) -> None:
        if not job.progress.made:
            self._metrics.first_model(self.served.name, job.age)
        job.record(made)
        self._metrics.made(self.served.name, len(made))
        start, count = self._made_since or (time.monotonic(), 0)
        self._made_since = (start, count + len(made))


def last_line(error: BaseException) -> str:
    """The last line of what an error says: Ray puts a traceback before it. Its type where it says nothing."""
    text = str(error).strip().splitlines()
    return text[-1] if text else type(error).__name__
