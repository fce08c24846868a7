"""The dispatcher: the one place that knows all jobs, hands out their models and writes down how far they are.

Models are handed out in leases. A lease is nothing durable: when a replica is lost its models are handed out
again, and when the dispatcher itself is lost the next one begins from what is on storage.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from rpg.config import GeneratorConfig
from rpg.errors import RPGError
from serve.access import Caller
from serve.config import LimitsConfig, RetentionConfig
from serve.fair_queue import FairQueue
from serve.job_store import JobStore, Quarantined, new_id
from serve.lease import Description, Lease, Maker
from serve.live_job import LiveJob
from serve.metrics import Meters
from serve.problems import ProblemError
from serve.records import Made, Manifest, State
from serve.requests import checked_job, request_digest
from serve.schema import JobRequest

T = TypeVar("T")

_SAVE_SECONDS = 5.0
"""A running job's state is written so often: a model that it does not name yet is found by looking."""
_TICK_SECONDS = 1.0
_LOST_REPLICAS = 10
"""A job that has lost so many replicas, and no model was made between, is taken for the reason."""
_LEASES_OF_A_JOB = 4
"""For each replica: some are sampled, some wait for it, some are being written."""
_LEASES_OF_A_REPLICA = 64
_BATCHES_OF_A_LEASE = 16

_log = logging.getLogger("ray.serve")


class Dispatcher:
    """All jobs. Methods are called from one event loop; files are read and written in threads."""

    def __init__(
        self,
        store: JobStore,
        generators: Mapping[str, GeneratorConfig],
        makers: Mapping[str, Maker],
        replicas: Mapping[str, int],
        limits: LimitsConfig,
        retention: RetentionConfig,
        meters: Meters,
    ) -> None:
        """`generators`, `makers` and `replicas` (how many at most) have one entry for each served name."""
        self.generators = generators
        self.descriptions: dict[str, Description] = {}
        self.speeds: dict[str, float] = {}
        self.quarantined: dict[str, Quarantined] = {}
        self._store = store
        self._makers = makers
        self._replicas = replicas
        self._limits = limits
        self._retention = retention
        self._meters = meters
        self._jobs: dict[str, LiveJob] = {}
        self._by_key: dict[tuple[str, str], asyncio.Future[LiveJob]] = {}
        self._turns: dict[str, FairQueue[str]] = {name: FairQueue() for name in makers}
        self._wake = {name: asyncio.Event() for name in makers}
        self._leases = dict.fromkeys(makers, 0)
        self._made_since: dict[str, tuple[float, int]] = {}
        self._reserved = 0
        self._files = ThreadPoolExecutor(8, thread_name_prefix="store")
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Take up what is on storage, and begin to hand out."""
        for found in await self._in_thread(lambda: list(self._store.all())):
            if isinstance(found, Quarantined):
                _log.error("job %s is quarantined: %s", found.id, found.reason)
                self.quarantined[found.id] = found
                continue
            job = LiveJob(*found)
            self._add(job)
            if not job.has_ended and not job.remaining:
                await self._end(job, State.succeeded)
        for name in self._makers:
            self._tasks.append(asyncio.create_task(self._feed(name)))
        self._tasks.append(asyncio.create_task(self._keep_house()))

    async def stop(self) -> None:
        """Hand out nothing more, and write down how far everything is."""
        leases = [task for job in self._jobs.values() for task in job.leases]
        for task in [*self._tasks, *leases]:
            task.cancel()
        await asyncio.gather(*self._tasks, *leases, return_exceptions=True)
        for job in self._jobs.values():
            if job.dirty:
                await self._save(job)
        self._files.shutdown()

    @property
    def failed_task(self) -> str | None:
        """What has ended that never should, for health checks."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                return repr(task.exception())
        return None

    async def submit(self, caller: Caller, request: JobRequest, key: str | None) -> LiveJob:
        """Accept a job: it is on storage when this returns.

        A `key` that this owner has used before gives back the job that it stands for; a job that had failed
        is tried once more.

        Raises:
            ProblemError: 422 for what cannot be made, or for a key that stands for another request; 429 if
                too much is waiting; 507 if it cannot be written.
        """
        job = checked_job(request, self.generators, self._limits)
        digest = request_digest(request)
        if key is None:
            return await self._accept(caller, request, job_key=None, digest=digest)
        known = self._by_key.get((caller.owner, key))
        if known is None:
            known = asyncio.get_running_loop().create_future()
            self._by_key[caller.owner, key] = known
            try:
                known.set_result(await self._accept(caller, request, key, digest))
            except BaseException as error:
                del self._by_key[caller.owner, key]
                known.set_exception(error if isinstance(error, Exception) else RPGError("cut off"))
                known.exception()
                raise
            return known.result()
        earlier = await asyncio.shield(known)
        if earlier.manifest.request_sha256 != digest:
            raise ProblemError(422, f"Idempotency-Key: '{key}' stands for another request: job {earlier.id}")
        if earlier.progress.state == State.failed:
            self._check_room(len(job))
            earlier.revive()
            self._enqueue(earlier)
            await self._save(earlier)
        return earlier

    def job(self, caller: Caller, job_id: str) -> LiveJob:
        """A job that the caller may see.

        Raises:
            ProblemError: 404 where there is none, or it is another owner's; 409 for a quarantined one.
        """
        job = self._jobs.get(job_id)
        if job is not None and (caller.is_admin or job.manifest.owner == caller.owner):
            return job
        if caller.is_admin and job_id in self.quarantined:
            raise ProblemError(409, f"job {job_id} is quarantined: {self.quarantined[job_id].reason}")
        raise ProblemError(404, f"no job '{job_id}'")

    def jobs(self, caller: Caller) -> list[LiveJob]:
        """All that the caller may see, newest first."""
        seen = [j for j in self._jobs.values() if caller.is_admin or j.manifest.owner == caller.owner]
        return sorted(seen, key=lambda job: (-job.manifest.created, job.id))

    async def cancel_or_remove(self, caller: Caller, job_id: str) -> LiveJob | None:
        """Cancel a job that has not ended, or remove one that has (None)."""
        if caller.is_admin and job_id in self.quarantined:
            del self.quarantined[job_id]
            await self._in_thread(lambda: self._store.remove(job_id))
            return None
        job = self.job(caller, job_id)
        if job.has_ended:
            await self._remove(job)
            return None
        await self._end(job, State.cancelled)
        return job

    async def _accept(self, caller: Caller, request: JobRequest, job_key: str | None, digest: str) -> LiveJob:
        job = checked_job(request, self.generators, self._limits)
        self._check_room(len(job))
        manifest = Manifest(
            id=new_id(),
            owner=caller.owner,
            generator=request.generator,
            priority=request.priority,
            created=time.time(),
            job=job,
            idempotency_key=job_key,
            request_sha256=digest,
        )
        # Others are accepted while this one is written.
        self._reserved += len(job)
        try:
            await self._in_thread(lambda: self._store.create(manifest))
        except RPGError as error:
            _log.error("%s", error)
            raise ProblemError(507, f"the job cannot be stored: {_reason(error)}") from error
        finally:
            self._reserved -= len(job)
        live = LiveJob(manifest, await self._in_thread(lambda: self._store.progress(manifest)))
        self._add(live)
        return live

    def _check_room(self, models: int) -> None:
        waiting = sum(job.remaining for job in self._jobs.values()) + self._reserved
        excess = waiting + models - self._limits.queued_models
        if excess > 0:
            rate = sum(self.speeds.values()) or 1.0
            seconds = min(3600, max(1, math.ceil(excess / rate)))
            raise ProblemError(
                429,
                f"{waiting} models are waiting, and {models} more would be above "
                f"limits.queued_models = {self._limits.queued_models}",
                headers={"Retry-After": str(seconds)},
            )

    def _add(self, job: LiveJob) -> None:
        self._jobs[job.id] = job
        manifest = job.manifest
        if (
            manifest.idempotency_key is not None
            and (manifest.owner, manifest.idempotency_key) not in self._by_key
        ):
            known: asyncio.Future[LiveJob] = asyncio.get_running_loop().create_future()
            known.set_result(job)
            self._by_key[manifest.owner, manifest.idempotency_key] = known
        if not job.has_ended:
            self._enqueue(job)

    def _enqueue(self, job: LiveJob) -> None:
        name = job.manifest.generator
        if name not in self._makers:
            # It may come back; meanwhile nothing is lost.
            job.note = f"waits: generator '{name}' is not served"
            return
        self._turns[name].join(job.id, job.manifest.priority)
        self._wake[name].set()

    async def _feed(self, name: str) -> None:
        """Hand out one generator's models for as long as the service runs."""
        description = await self._described(name)
        self.descriptions[name] = description
        most = _LEASES_OF_A_REPLICA * self._replicas[name]
        while True:
            self._wake[name].clear()
            while self._leases[name] < most and (job := self._next(name)) is not None:
                await self._hand_out(name, job, description)
            await self._wake[name].wait()

    async def _described(self, name: str) -> Description:
        while True:
            try:
                return await self._makers[name].describe()
            except Exception as error:
                _log.warning("generator %s: no replica answers: %s", name, _reason(error))
                await asyncio.sleep(1)

    def _next(self, name: str) -> LiveJob | None:
        most = _LEASES_OF_A_JOB * self._replicas[name]
        turns = self._turns[name]
        order = turns.order(lambda job: self._jobs[job].waits and len(self._jobs[job].leases) < most)
        return self._jobs[order[0]] if order else None

    async def _hand_out(self, name: str, job: LiveJob, description: Description) -> None:
        if job.progress.digest is None:
            job.progress.digest = description.digest
            # Before a model is made: after a crash all must come from the same generator.
            await self._save(job)
            if job.has_ended:
                return
        rows = _BATCHES_OF_A_LEASE * job.manifest.job.sampling.token_batch
        models = job.lease(max(1, math.ceil(rows / max(1, description.tokens))))
        if not models:
            return
        lease = Lease(job.id, job.manifest.priority, job.progress.digest, models)
        self._turns[name].served(job.id, len(models))
        self._leases[name] += 1
        task = asyncio.create_task(self._run_lease(name, job, lease))
        job.leases.add(task)
        task.add_done_callback(lambda done: self._lease_done(name, job, done))

    def _lease_done(self, name: str, job: LiveJob, task: "asyncio.Task[None]") -> None:
        job.leases.discard(task)
        self._leases[name] -= 1
        self._wake[name].set()

    async def _run_lease(self, name: str, job: LiveJob, lease: Lease) -> None:
        left = set(lease.models)
        failure: str | None = None
        try:
            async with aclosing(self._makers[name].make(lease)) as events:  # type: ignore[type-var]
                async for event in events:
                    if job.has_ended:
                        break
                    if isinstance(event, str):
                        failure = event
                        break
                    self._record(name, job, event)
                    left -= {made.model for made in event}
        except Exception as error:
            job.losses += 1
            _log.warning("job %s: a replica of %s was lost: %s", job.id, name, _reason(error))
            if job.losses >= _LOST_REPLICAS:
                failure = f"{job.losses} replicas were lost at it, one after the other: {_reason(error)}"
            else:
                await asyncio.sleep(min(5.0, 0.2 * 2**job.losses))
        finally:
            if not job.has_ended:
                job.give_back(left)
        if job.has_ended:
            return
        if failure is not None:
            _log.error("job %s failed: %s", job.id, failure)
            await self._end(job, State.failed, failure)
        elif not job.remaining:
            await self._end(job, State.succeeded)

    def _record(self, name: str, job: LiveJob, made: list[Made]) -> None:
        if not job.progress.made:
            self._meters.first_model(name, job.age)
        job.record(made)
        self._meters.made(name, len(made))
        start, count = self._made_since.get(name, (time.monotonic(), 0))
        self._made_since[name] = (start, count + len(made))

    async def _end(self, job: LiveJob, state: State, error: str | None = None) -> None:
        job.end(state, error)
        name = job.manifest.generator
        if name in self._turns:
            self._turns[name].leave(job.id)
        me = asyncio.current_task()
        others = [task for task in job.leases if task is not me]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._meters.ended(name, state, job.age)
        await self._save(job)
        await self._in_thread(lambda: self._store.tidy(job.id))

    async def _save(self, job: LiveJob) -> None:
        """Write a job's state; where that fails it is tried again later, since nothing depends on it now."""
        async with job.saving:
            if job.id not in self._jobs:
                return
            job.dirty = False
            # More models are recorded while this is written.
            now = replace(job.progress, made=dict(job.progress.made))
            try:
                await self._in_thread(lambda: self._store.save(job.id, now))
            except (RPGError, OSError) as error:
                job.dirty = True
                _log.error("%s", _reason(error))

    async def _remove(self, job: LiveJob) -> None:
        async with job.saving:
            self._jobs.pop(job.id, None)
        key = job.manifest.idempotency_key
        if key is not None:
            self._by_key.pop((job.manifest.owner, key), None)
        await self._in_thread(lambda: self._store.remove(job.id))

    async def _keep_house(self) -> None:
        saved = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self._measure()
            if time.monotonic() - saved >= _SAVE_SECONDS:
                for job in [job for job in self._jobs.values() if job.dirty]:
                    await self._save(job)
                for job in self._expired():
                    await self._remove(job)
                saved = time.monotonic()

    def _measure(self) -> None:
        for name in self._makers:
            start, count = self._made_since.get(name, (time.monotonic(), 0))
            seconds = time.monotonic() - start
            if count and seconds >= _TICK_SECONDS:
                self.speeds[name] = count / seconds
                del self._made_since[name]
            waiting = sum(j.remaining for j in self._jobs.values() if j.manifest.generator == name)
            self._meters.waiting(name, waiting)

    def _expired(self) -> list[LiveJob]:
        now = time.monotonic()
        ended = [(now - job.ended_at, job) for job in self._jobs.values() if job.ended_at is not None]
        kept = 0
        expired = []
        for age, job in sorted(ended, key=lambda each: each[0]):
            kept += job.bytes
            if age > self._retention.days * 86400 or kept > self._retention.gigabytes * 1e9:
                expired.append(job)
        return expired

    async def _in_thread(self, function: Callable[[], T]) -> T:
        waiting: Awaitable[T] = asyncio.get_running_loop().run_in_executor(self._files, function)
        return await waiting


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[-1] if text else type(error).__name__
