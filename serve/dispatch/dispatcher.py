"""The dispatcher: the one place that knows all jobs. It accepts them, has them made, and ends them.

The jobs are in a `JobTable`, which writes down how far they are. For each generator that is served, a
`GeneratorScheduler` hands out the models of its jobs.
"""

import asyncio
import errno
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TypeVar

from rpg.client.schema import JobRequest, JobState
from rpg.errors import RPGError
from rpg.sampling.job import GenerationJob
from rpg.words.understood import Understood
from serve.config import LimitsConfig, RetentionConfig
from serve.dispatch.caller import Caller
from serve.dispatch.job_table import JobTable
from serve.dispatch.lease import Embedded, Replicas
from serve.dispatch.live_job import LiveJob
from serve.dispatch.records import JobManifest
from serve.dispatch.requests import checked_job, request_digest
from serve.dispatch.scheduler import MAX_LOST_REPLICAS, GeneratorScheduler, last_line
from serve.dispatch.served_generator import ServedGenerator
from serve.dispatch.store import JobStore, Quarantined, new_id
from serve.errors import ProblemError
from serve.metrics import JobMetrics

T = TypeVar("T")

_log = logging.getLogger("ray.serve")


class Dispatcher:
    """All jobs and the generators that are served. Methods are called from one event loop.

    Attributes:
        schedulers: of the generators that are served, by name.
    """

    def __init__(
        self,
        store: JobStore,
        limits: LimitsConfig,
        retention: RetentionConfig,
        metrics: JobMetrics,
        *,
        tick_seconds: float = 1.0,
        save_seconds: float = 5.0,
        removal_seconds: float = 5.0,
        embed_seconds: float = 20.0,
        max_lost_replicas: int = MAX_LOST_REPLICAS,
    ) -> None:
        """Nothing is read before `start`.

        Args:
            store: where jobs are.
            limits: what is refused.
            retention: how long jobs are kept.
            metrics: where jobs are counted.
            tick_seconds: between two measurements of speed and of what waits.
            save_seconds: between two times that changed states are written and expired jobs removed. Models
                that a state does not name yet are found by looking for their files.
            removal_seconds: how long expired jobs are removed at a time: states are to be written as well.
            embed_seconds: how long a replica may take for a job's descriptions. The front waits longer for
                its answer.
            max_lost_replicas: a job fails that has lost so many, and no model was made in between.
        """
        self.schedulers: dict[str, GeneratorScheduler] = {}
        self._table = JobTable(store, limits, retention, removal_seconds)
        self._limits = limits
        self._metrics = metrics
        self._tick_seconds = tick_seconds
        self._save_seconds = save_seconds
        self._embed_seconds = embed_seconds
        self._max_lost_replicas = max_lost_replicas
        self._reserved = 0
        """Models of jobs that are being accepted."""
        self._maintenance: asyncio.Task[None] | None = None

    @property
    def quarantined(self) -> Mapping[str, Quarantined]:
        """Jobs that cannot be read, by id."""
        return self._table.quarantined

    async def start(self) -> None:
        """Take up the jobs that are on storage. They wait until their generator is served."""
        await self._table.load()
        for job in list(self._table):
            if not job.has_ended:
                self._enqueue(job)
                if not job.remaining:
                    await self.end(job, JobState.succeeded)
        self._maintenance = asyncio.create_task(self._maintain())

    async def stop(self) -> None:
        """Hand out nothing more, and write down how far everything is."""
        if self._maintenance is not None:
            self._maintenance.cancel()
            await asyncio.gather(self._maintenance, return_exceptions=True)
        await asyncio.gather(*(scheduler.stop() for scheduler in self.schedulers.values()))
        await self._table.save_changed()
        self._table.close()

    @property
    def failure(self) -> str | None:
        """The error that has ended a part of the dispatcher, for health checks; None while all goes on."""
        for scheduler in self.schedulers.values():
            if scheduler.failure:
                return scheduler.failure
        task = self._maintenance
        return repr(task.exception()) if task and task.done() and not task.cancelled() else None

    async def add_generator(self, served: ServedGenerator) -> GeneratorScheduler:
        """Accept jobs for a generator, in the place of an earlier one of its name.

        The jobs wait until the scheduler, which is returned, is started.
        """
        earlier = self.schedulers.get(served.name)
        scheduler = GeneratorScheduler(served, self, self._metrics, self._max_lost_replicas)
        self.schedulers[served.name] = scheduler
        if earlier is not None:
            await earlier.stop()
        for job in self._unfinished(served.name):
            scheduler.add(job)
        return scheduler

    async def remove_generator(self, name: str) -> None:
        """Accept no more jobs for a generator, if it is served. Its unfinished jobs wait for its return."""
        scheduler = self.schedulers.pop(name, None)
        if scheduler is not None:
            await scheduler.stop()
        for job in self._unfinished(name):
            self._enqueue(job)

    async def submit(self, caller: Caller, request: JobRequest, key: str | None) -> LiveJob:
        """Accept a job: it is on storage when this returns.

        A `key` that this owner has used before gives back the job that it stands for; a job that had failed
        is tried once more.

        Raises:
            ProblemError: 422 for what cannot be made, or for a key that stands for another request; 429 if
                too much is waiting; 503 if no replica reads its descriptions; 507 if it cannot be written.
        """
        job = checked_job(request, self._served(), self._limits)
        digest = request_digest(request)
        if key is None:
            return await self._accept(caller, request, job, None, digest)
        by_key = self._table.by_key
        known = by_key.get((caller.owner, key))
        if known is None:
            known = asyncio.get_running_loop().create_future()
            by_key[caller.owner, key] = known
            try:
                known.set_result(await self._accept(caller, request, job, key, digest))
            except BaseException as error:
                del by_key[caller.owner, key]
                known.set_exception(error if isinstance(error, Exception) else RPGError("cut off"))
                # Asking for the exception keeps asyncio from logging that nobody did.
                known.exception()
                raise
            return known.result()
        earlier = await asyncio.shield(known)
        if earlier.manifest.request_sha256 != digest:
            raise ProblemError(422, f"Idempotency-Key: '{key}' stands for another request: job {earlier.id}")
        if earlier.progress.state == JobState.failed:
            self._check_queue_limit(len(job))
            try:
                was_written = await self._table.write(earlier, earlier.revived())
            except RPGError as error:
                _log.error("job %s is not tried again: %s", earlier.id, error)
                raise ProblemError(
                    storage_status(error), f"job {earlier.id} cannot be stored: {last_line(error)}"
                ) from error
            if not was_written:
                # Meanwhile somebody else has revived the job or removed it.
                return await self.submit(caller, request, key)
            earlier.revive()
            self._enqueue(earlier)
        return earlier

    def job(self, caller: Caller, job_id: str) -> LiveJob:
        """A job that the caller may see.

        Raises:
            ProblemError: 404 where there is none, or it is another owner's; 409 for a quarantined one.
        """
        job = self._table.get(job_id)
        if job is not None and (caller.is_admin or job.manifest.owner == caller.owner):
            return job
        if caller.is_admin and job_id in self.quarantined:
            raise ProblemError(409, f"job {job_id} is quarantined: {self.quarantined[job_id].reason}")
        raise ProblemError(404, f"no job '{job_id}'")

    def jobs(self, caller: Caller) -> list[LiveJob]:
        """All that the caller may see, newest first."""
        seen = [job for job in self._table if caller.is_admin or job.manifest.owner == caller.owner]
        return sorted(seen, key=lambda job: (-job.manifest.created, job.id))

    async def cancel_or_remove(self, caller: Caller, job_id: str) -> LiveJob | None:
        """Cancel a job that has not ended, or remove one that has (None).

        Raises:
            ProblemError: 404 where there is none, or it is another owner's; 507 or 503 if the storage is full
                or refuses, in which case the job stays as it was.
        """
        try:
            if caller.is_admin and job_id in self.quarantined:
                await self._table.remove_quarantined(job_id)
                return None
            job = self.job(caller, job_id)
            if job.has_ended and await self._table.remove(job):
                return None
            # The state is written before the job ends, so that no start takes up what somebody was told is
            # cancelled.
            while not job.has_ended:
                if await self._table.write(job, job.cancelled()):
                    await self.end(job, JobState.cancelled)
        except RPGError as error:
            _log.error("job %s stays: %s", job_id, error)
            raise ProblemError(
                storage_status(error),
                f"job {job_id} stays for now: {last_line(error)}",
                headers={"Retry-After": "5"},
            ) from error
        return job

    async def end(self, job: LiveJob, state: JobState, error: str | None = None) -> None:
        """End a job: stop the leases of it, and write down that it has ended."""
        job.end(state, error)
        name = job.manifest.generator
        if name in self.schedulers:
            self.schedulers[name].remove(job)
        # The lease that finished the job's last model may be what calls this.
        current = asyncio.current_task()
        others = [task for task in job.leases if task is not current]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._metrics.ended(name, state, job.age)
        await self.save(job)
        await self._table.remove_partial_files(job)

    async def save(self, job: LiveJob) -> None:
        """Write a job's state. Where that fails, it is tried again later."""
        await self._table.save(job)

    async def _accept(
        self, caller: Caller, request: JobRequest, job: GenerationJob, key: str | None, digest: str
    ) -> LiveJob:
        self._check_queue_limit(len(job))
        # Others are accepted while this one's descriptions are read and its manifest is written.
        self._reserved += len(job)
        try:
            embedded = await self._embedded(request)
            if embedded is not None:
                job = replace(job, conditions=embedded.conditions)
            manifest = JobManifest(
                id=new_id(),
                owner=caller.owner,
                generator=request.generator,
                priority=request.priority,
                created=time.time(),
                job=job,
                evaluate=request.evaluate,
                # What measures a model reads its file.
                pack=request.pack and not request.evaluate,
                idempotency_key=key,
                request_sha256=digest,
                descriptions=request.descriptions,
                encoder=None if embedded is None else embedded.encoder,
                understood=None if embedded is None else embedded.understood,
            )
            live = await self._table.create(manifest)
        except RPGError as error:
            _log.error("%s", error)
            raise ProblemError(507, f"the job cannot be stored: {last_line(error)}") from error
        finally:
            self._reserved -= len(job)
        self._enqueue(live)
        return live

    async def understood(self, name: str, description: str) -> Understood:
        """What a generator's words model understands of a description.

        Raises:
            ProblemError: 404 if there is no such generator; 422 if it has no words model, or for a
                description that cannot be read; 503 if no replica answers in time.
        """
        if name not in self.schedulers:
            raise ProblemError(404, f"no generator '{name}'")
        return await self._read(name, lambda replicas: replicas.understand(description))

    async def _embedded(self, request: JobRequest) -> Embedded | None:
        """A replica's embeddings of a request's descriptions; None for a request without any.

        Raises:
            ProblemError: 422 for a description that cannot be read; 503 if no replica answers in time.
        """
        descriptions = request.descriptions
        if descriptions is None:
            return None
        return await self._read(request.generator, lambda replicas: replicas.embed(descriptions))

    async def _read(self, name: str, ask: Callable[[Replicas], Awaitable[T | str]]) -> T:
        """What a replica of a generator answers about descriptions.

        Raises:
            ProblemError: 422 with its line, if it answers with one; 503 if none answers in time.
        """
        replicas = self.schedulers[name].replicas
        if replicas is None:
            raise ProblemError(503, f"generator '{name}' has not started yet", headers={"Retry-After": "1"})
        try:
            async with asyncio.timeout(self._embed_seconds):
                answer = await ask(replicas)
        except Exception as error:
            _log.warning("generator %s: descriptions were not read: %s", name, last_line(error))
            raise ProblemError(
                503,
                f"no replica of generator '{name}' has read the descriptions; try once more",
                headers={"Retry-After": "1"},
            ) from error
        if isinstance(answer, str):
            raise ProblemError(422, answer)
        return answer

    def _check_queue_limit(self, models: int) -> None:
        """Refuse `models` more if too many are waiting already.

        Raises:
            ProblemError: 429, which says when to come back.
        """
        waiting = sum(job.remaining for job in self._table) + self._reserved
        excess = waiting + models - self._limits.queued_models
        if excess > 0:
            rate = sum(scheduler.speed or 0.0 for scheduler in self.schedulers.values()) or 1.0
            seconds = min(3600, max(1, math.ceil(excess / rate)))
            raise ProblemError(
                429,
                f"{waiting} models are waiting, and {models} more would be above "
                f"limits.queued_models = {self._limits.queued_models}",
                headers={"Retry-After": str(seconds)},
            )

    def _enqueue(self, job: LiveJob) -> None:
        name = job.manifest.generator
        if name in self.schedulers:
            self.schedulers[name].add(job)
        else:
            # The generator may come back, so the job does not fail.
            job.note = f"waits: generator '{name}' is not served"
            job.notify()

    def _served(self) -> Mapping[str, ServedGenerator]:
        return {name: scheduler.served for name, scheduler in self.schedulers.items()}

    def _unfinished(self, generator: str) -> list[LiveJob]:
        return [job for job in self._table if job.manifest.generator == generator and not job.has_ended]

    async def _maintain(self) -> None:
        """Measure, save and remove, for as long as the dispatcher runs."""
        saved = time.monotonic()
        while True:
            await asyncio.sleep(self._tick_seconds)
            for name, scheduler in self.schedulers.items():
                scheduler.measure(sum(job.remaining for job in self._unfinished(name)))
            if time.monotonic() - saved >= self._save_seconds:
                await self._table.save_changed()
                await self._table.remove_expired()
                saved = time.monotonic()


def storage_status(error: BaseException) -> int:
    """The status that tells why the storage refused: 507 if it is full, 503 for anything else."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return 507
        cause = cause.__cause__
    return 503
