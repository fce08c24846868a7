"""The dispatcher: the one place that knows all jobs, and writes down how far they are.

Each served generator has a feed (`serve.dispatch.scheduler`), which hands out the models of its jobs.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from rpg.client.schema import JobRequest, JobState
from rpg.errors import RPGError
from rpg.sampling.job import GenerationJob
from serve.config import LimitsConfig, RetentionConfig
from serve.dispatch.lease import Embedded, Maker
from serve.dispatch.live_job import LiveJob
from serve.dispatch.records import JobManifest, JobProgress
from serve.dispatch.requests import checked_job, request_digest
from serve.dispatch.scheduler import Feed, Served, reason
from serve.dispatch.store import JobStore, Quarantined, new_id
from serve.http.auth import Caller
from serve.http.problems import ProblemError
from serve.metrics import Meters

T = TypeVar("T")

_SAVE_SECONDS = 5.0
"""A running job's state is written so often: a model that it does not name yet is found by looking."""
_TICK_SECONDS = 1.0
_EMBED_SECONDS = 20.0
"""Less than the front waits for an answer."""

_log = logging.getLogger("ray.serve")


class Dispatcher:
    """All jobs. Methods are called from one event loop; files are read and written in threads.

    Attributes:
        feeds: of the generators that are served, by name.
        quarantined: jobs that cannot be read, by id.
    """

    def __init__(
        self, store: JobStore, limits: LimitsConfig, retention: RetentionConfig, meters: Meters
    ) -> None:
        self.feeds: dict[str, Feed] = {}
        self.quarantined: dict[str, Quarantined] = {}
        self._store = store
        self._limits = limits
        self._retention = retention
        self._meters = meters
        self._jobs: dict[str, LiveJob] = {}
        self._by_key: dict[tuple[str, str], asyncio.Future[LiveJob]] = {}
        self._left_over: set[str] = set()
        self._reserved = 0
        self._files = ThreadPoolExecutor(8, thread_name_prefix="store")
        self._house: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take up what is on storage. Jobs wait until their generator is served."""
        for found in await self._in_thread(lambda: list(self._store.all())):
            if isinstance(found, Quarantined):
                _log.error("job %s is quarantined: %s", found.id, found.reason)
                self.quarantined[found.id] = found
                continue
            job = LiveJob(*found)
            self._add(job)
            if not job.has_ended and not job.remaining:
                await self.end(job, JobState.succeeded)
        self._house = asyncio.create_task(self._keep_house())

    async def stop(self) -> None:
        """Hand out nothing more, and write down how far everything is."""
        if self._house is not None:
            self._house.cancel()
            await asyncio.gather(self._house, return_exceptions=True)
        await asyncio.gather(*(feed.stop() for feed in self.feeds.values()))
        for job in self._jobs.values():
            if job.dirty:
                await self.save(job)
        self._files.shutdown()

    @property
    def failure(self) -> str | None:
        """What has ended that never should, for health checks."""
        house = self._house
        ended = repr(house.exception()) if house and house.done() and not house.cancelled() else None
        return next((feed.failure for feed in self.feeds.values() if feed.failure), ended)

    async def announce(self, served: Served) -> Feed:
        """Accept jobs for a generator, in the place of an earlier one of its name.

        They wait until the feed, which is returned, is started.
        """
        earlier = self.feeds.get(served.name)
        feed = self.feeds[served.name] = Feed(served, self, self._meters)
        if earlier is not None:
            await earlier.stop()
        for job in self._unfinished(served.name):
            feed.join(job)
        return feed

    async def serve(self, served: Served, maker: Maker) -> None:
        """Accept jobs for a generator, and have them made."""
        (await self.announce(served)).start(maker)

    async def withdraw(self, name: str) -> None:
        """Serve a generator no more, if it is served. Its unfinished jobs wait for it to come back."""
        feed = self.feeds.pop(name, None)
        if feed is not None:
            await feed.stop()
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
        known = self._by_key.get((caller.owner, key))
        if known is None:
            known = asyncio.get_running_loop().create_future()
            self._by_key[caller.owner, key] = known
            try:
                known.set_result(await self._accept(caller, request, job, key, digest))
            except BaseException as error:
                del self._by_key[caller.owner, key]
                known.set_exception(error if isinstance(error, Exception) else RPGError("cut off"))
                known.exception()
                raise
            return known.result()
        earlier = await asyncio.shield(known)
        if earlier.manifest.request_sha256 != digest:
            raise ProblemError(422, f"Idempotency-Key: '{key}' stands for another request: job {earlier.id}")
        if earlier.progress.state == JobState.failed:
            self._check_room(len(job))
            earlier.revive()
            self._enqueue(earlier)
            await self.save(earlier)
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
        """Cancel a job that has not ended, or remove one that has (None).

        Raises:
            ProblemError: see `job`; 503 if the storage refuses to remove it, which then stays.
        """
        try:
            if caller.is_admin and job_id in self.quarantined:
                await self._in_thread(lambda: self._store.discard(job_id))
                self.quarantined.pop(job_id, None)
                await self._clear(job_id)
                return None
            job = self.job(caller, job_id)
            if job.has_ended and await self._remove(job):
                return None
        except RPGError as error:
            _log.error("job %s stays: %s", job_id, error)
            raise ProblemError(
                503, f"job {job_id} stays for now: {reason(error)}", headers={"Retry-After": "5"}
            ) from error
        await self.end(job, JobState.cancelled)
        return job

    async def end(self, job: LiveJob, state: JobState, error: str | None = None) -> None:
        """End a job: whoever is at it stops, and that it has ended is written down."""
        job.end(state, error)
        name = job.manifest.generator
        if name in self.feeds:
            self.feeds[name].leave(job)
        me = asyncio.current_task()
        others = [task for task in job.leases if task is not me]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        self._meters.ended(name, state, job.age)
        await self.save(job)
        await self._in_thread(lambda: self._store.tidy(job.id))

    async def save(self, job: LiveJob) -> None:
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
                _log.error("%s", reason(error))
            except asyncio.CancelledError:
                job.dirty = True
                raise

    async def _accept(
        self, caller: Caller, request: JobRequest, job: GenerationJob, key: str | None, digest: str
    ) -> LiveJob:
        self._check_room(len(job))
        # Others are accepted while this one is read and written.
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
                idempotency_key=key,
                request_sha256=digest,
                descriptions=request.descriptions,
                encoder=None if embedded is None else embedded.encoder,
            )
            await self._in_thread(lambda: self._store.create(manifest))
        except RPGError as error:
            _log.error("%s", error)
            raise ProblemError(507, f"the job cannot be stored: {reason(error)}") from error
        finally:
            self._reserved -= len(job)
        live = LiveJob(manifest, JobProgress(JobState.queued, made={}))
        self._add(live)
        return live

    async def _embedded(self, request: JobRequest) -> Embedded | None:
        """What a replica makes of the descriptions of a request, if it gives any.

        Raises:
            ProblemError: 422 for a description that cannot be read; 503 if no replica answers in time.
        """
        if request.descriptions is None:
            return None
        name, feed = request.generator, self.feeds[request.generator]
        if feed.maker is None:
            raise ProblemError(503, f"generator '{name}' has not started yet", headers={"Retry-After": "1"})
        try:
            async with asyncio.timeout(_EMBED_SECONDS):
                embedded = await feed.maker.embed(request.descriptions)
        except Exception as error:
            _log.warning("generator %s: descriptions were not read: %s", name, reason(error))
            raise ProblemError(
                503,
                f"no replica of generator '{name}' has read the descriptions; try once more",
                headers={"Retry-After": "1"},
            ) from error
        if isinstance(embedded, str):
            raise ProblemError(422, embedded)
        return embedded

    def _check_room(self, models: int) -> None:
        waiting = sum(job.remaining for job in self._jobs.values()) + self._reserved
        excess = waiting + models - self._limits.queued_models
        if excess > 0:
            rate = sum(feed.speed or 0.0 for feed in self.feeds.values()) or 1.0
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
        if name in self.feeds:
            self.feeds[name].join(job)
        else:
            # It may come back; meanwhile nothing is lost.
            job.note = f"waits: generator '{name}' is not served"
            job.change()

    def _served(self) -> Mapping[str, Served]:
        return {name: feed.served for name, feed in self.feeds.items()}

    def _unfinished(self, generator: str) -> list[LiveJob]:
        return [j for j in self._jobs.values() if j.manifest.generator == generator and not j.has_ended]

    async def _remove(self, job: LiveJob) -> bool:
        """Remove a job that has ended; False if it has been revived meanwhile.

        Raises:
            RPGError: if the storage refuses; the job stays.
        """
        async with job.saving:
            if not job.has_ended:
                return False
            if self._jobs.pop(job.id, None) is None:
                return True
            key = job.manifest.idempotency_key
            if key is not None:
                self._by_key.pop((job.manifest.owner, key), None)
            try:
                await self._in_thread(lambda: self._store.discard(job.id))
            except RPGError:
                self._add(job)
                raise
        await self._clear(job.id)
        return True

    async def _clear(self, job_id: str) -> None:
        """Remove the files of a job that is none any more; what is left is tried again later."""
        self._left_over.discard(job_id)
        try:
            await self._in_thread(lambda: self._store.clear(job_id))
        except RPGError as error:
            _log.error("%s; it is tried again", error)
            self._left_over.add(job_id)

    async def _keep_house(self) -> None:
        saved = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self._measure()
            if time.monotonic() - saved >= _SAVE_SECONDS:
                for job in [job for job in self._jobs.values() if job.dirty]:
                    await self.save(job)
                await self._make_room()
                saved = time.monotonic()

    async def _make_room(self) -> None:
        """Remove what is not to be kept, as far as there is time: other jobs' states are to be saved."""
        start = time.monotonic()
        failures: list[str] = []
        for job, ended_at in [(job, job.ended_at) for job in self._expired()]:
            try:
                # Meanwhile it may have been revived, and may even have ended again.
                if job.ended_at == ended_at:
                    await self._remove(job)
            except RPGError as error:
                failures.append(reason(error))
            if time.monotonic() - start > _SAVE_SECONDS:
                break
        if failures:
            _log.error("%d jobs were to be removed and stay for now: %s", len(failures), failures[0])
        for job_id in list(self._left_over):
            await self._clear(job_id)

    def _measure(self) -> None:
        for name, feed in self.feeds.items():
            feed.measure(sum(job.remaining for job in self._unfinished(name)))

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
