"""Handing out: the jobs of one generator take turns, and its replicas get their models in leases.

A lease is nothing durable: when a replica is lost its models are handed out again, and when the dispatcher
itself is lost the next one begins from what is on storage.
"""

import asyncio
import logging
import math
import time
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from rpg.client.schema import JobState
from rpg.config import ConditionKind, GeneratorConfig
from rpg.sampling.fair_queue import FairQueue
from serve.dispatch.lease import Description, Lease, Maker
from serve.dispatch.live_job import LiveJob
from serve.dispatch.records import Made
from serve.metrics import Meters

_LOST_REPLICAS = 10
"""A job that has lost so many replicas, and no model was made between, is taken for the reason."""
_LEASES_OF_A_JOB = 4
"""For each replica: some are sampled, some wait for it, some are being written."""
_LEASES_OF_A_REPLICA = 64
_BATCHES_OF_A_LEASE = 16
_SPEED_SECONDS = 1.0

_log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Served:
    """A generator as the service's configuration offers it."""

    name: str
    config: GeneratorConfig
    replicas: int
    """At most."""
    has_collection: bool = False

    @property
    def takes_conditions(self) -> bool:
        """Whether jobs give conditions."""
        return self.config.condition.kind == ConditionKind.vector

    @property
    def evaluates(self) -> bool:
        """Whether jobs may ask for evaluation: without a condition nothing says which answers are right."""
        return self.has_collection and self.takes_conditions

    @property
    def reads(self) -> bool:
        """Whether jobs may give descriptions."""
        return bool(self.config.condition.encoder)


class JobKeeper(Protocol):
    """Whoever writes down how far jobs are."""

    async def save(self, job: LiveJob) -> None:
        """Write a job's state."""
        ...

    async def end(self, job: LiveJob, state: JobState, error: str | None = None) -> None:
        """A job has ended."""
        ...


class Feed:
    """The jobs of one generator, and what its replicas are given of them between `start` and `stop`.

    Attributes:
        served: the generator.
        description: what a replica has told of it, once one has.
        maker: its replicas, once it has begun.
        speed: models a second, measured while jobs ran.
    """

    def __init__(self, served: Served, keeper: JobKeeper, meters: Meters) -> None:
        self.served = served
        self.description: Description | None = None
        self.maker: Maker | None = None
        self.speed: float | None = None
        self._keeper = keeper
        self._meters = meters
        self._turns: FairQueue[LiveJob] = FairQueue()
        self._wake = asyncio.Event()
        self._leases: set[asyncio.Task[None]] = set()
        self._made_since: tuple[float, int] | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, maker: Maker) -> None:
        """Begin to hand out."""
        self.maker = maker
        self._task = asyncio.create_task(self._run(maker))

    async def stop(self) -> None:
        """Hand out nothing more; what replicas had not finished waits again."""
        tasks = [*self._leases, *([self._task] if self._task else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def failure(self) -> str | None:
        """What has ended it that never should."""
        if self._task is None or not self._task.done() or self._task.cancelled():
            return None
        return repr(self._task.exception())

    def join(self, job: LiveJob) -> None:
        """Let a job take turns."""
        job.note = None
        self._turns.join(job, job.manifest.priority)
        self._wake.set()

    def leave(self, job: LiveJob) -> None:
        """A job takes no more turns."""
        self._turns.leave(job)

    def measure(self, waiting: int) -> None:
        """Take the time now and then; `waiting` models are asked for and not made."""
        self._meters.waiting(self.served.name, waiting)
        if self._made_since is not None:
            start, count = self._made_since
            seconds = time.monotonic() - start
            if count and seconds >= _SPEED_SECONDS:
                self.speed = count / seconds
                self._made_since = None

    async def _run(self, maker: Maker) -> None:
        self.description = await self._described(maker)
        most = _LEASES_OF_A_REPLICA * self.served.replicas
        while True:
            self._wake.clear()
            while len(self._leases) < most and (job := self._next()) is not None:
                await self._hand_out(job, maker, self.description)
            await self._wake.wait()

    async def _described(self, maker: Maker) -> Description:
        while True:
            try:
                return await maker.describe()
            except Exception as error:
                _log.warning("generator %s: no replica answers: %s", self.served.name, reason(error))
                await asyncio.sleep(1)

    def _next(self) -> LiveJob | None:
        most = _LEASES_OF_A_JOB * self.served.replicas
        order = self._turns.order(lambda job: job.waits and len(job.leases) < most)
        return order[0] if order else None

    async def _hand_out(self, job: LiveJob, maker: Maker, description: Description) -> None:
        if job.progress.digest != description.digest:
            if job.progress.made and job.progress.digest is not None:
                await self._fail(
                    job,
                    f"generator '{self.served.name}' was replaced by another version "
                    "while the job was under way",
                )
                return
            job.progress.digest = description.digest
            # Before a model is made: after a crash all must come from the same generator.
            await self._keeper.save(job)
            if job.has_ended:
                return
        rows = _BATCHES_OF_A_LEASE * job.manifest.job.sampling.token_batch
        models = job.lease(max(1, math.ceil(rows / max(1, description.tokens))))
        if not models:
            return
        lease = Lease(job.id, job.manifest.priority, description.digest, models)
        self._turns.served(job, len(models))
        task = asyncio.create_task(self._run_lease(job, maker, lease))
        job.leases.add(task)
        self._leases.add(task)
        task.add_done_callback(lambda done: self._lease_done(job, done))

    def _lease_done(self, job: LiveJob, task: "asyncio.Task[None]") -> None:
        job.leases.discard(task)
        self._leases.discard(task)
        self._wake.set()

    async def _run_lease(self, job: LiveJob, maker: Maker, lease: Lease) -> None:
        left = set(lease.models)
        failure: str | None = None
        try:
            async with aclosing(maker.make(lease)) as events:  # type: ignore[type-var]
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
            _log.warning("job %s: a replica of %s was lost: %s", job.id, self.served.name, reason(error))
            if job.losses >= _LOST_REPLICAS:
                failure = f"{job.losses} replicas were lost at it, one after the other: {reason(error)}"
            else:
                await asyncio.sleep(min(5.0, 0.2 * 2**job.losses))
        finally:
            if not job.has_ended:
                job.give_back(left)
        if job.has_ended:
            return
        if failure is not None:
            await self._fail(job, failure)
        elif not job.remaining:
            await self._keeper.end(job, JobState.succeeded)

    async def _fail(self, job: LiveJob, why: str) -> None:
        _log.error("job %s failed: %s", job.id, why)
        await self._keeper.end(job, JobState.failed, why)

    def _record(self, job: LiveJob, made: list[Made]) -> None:
        if not job.progress.made:
            self._meters.first_model(self.served.name, job.age)
        job.record(made)
        self._meters.made(self.served.name, len(made))
        start, count = self._made_since or (time.monotonic(), 0)
        self._made_since = (start, count + len(made))


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return text[-1] if text else type(error).__name__


def not_judged(generator: str) -> str:
    """Why networks of a generator without conditions are not evaluated."""
    return f"generator '{generator}' takes no conditions, and without one nothing says what is right"
