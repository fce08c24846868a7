"""All jobs of the service: in memory, and on storage by way of a `JobStore`.

The table reads what is on storage when the service starts, writes what changes, and removes jobs: those that
somebody removes, and those that are older or larger together than the service keeps.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

from rpg.client.schema import JobState
from rpg.errors import RPGError, one_line
from serve.config import LimitsConfig, RetentionConfig
from serve.dispatch.live_job import LiveJob
from serve.dispatch.records import JobManifest, JobProgress
from serve.dispatch.requests import beyond_limits
from serve.dispatch.store import JobStore, Quarantined

T = TypeVar("T")

_log = logging.getLogger("ray.serve")


class JobTable:
    """All jobs. Methods are called from one event loop; files are read and written in threads.

    Attributes:
        quarantined: jobs that cannot be read, by id.
        by_key: jobs by owner and Idempotency-Key, also those that are only about to be accepted.
    """

    def __init__(
        self,
        store: JobStore,
        limits: LimitsConfig,
        retention: RetentionConfig,
        removal_seconds: float = 5.0,
    ) -> None:
        """Nothing is read before `load`.

        Args:
            store: where jobs are.
            limits: what a job that is still to be made may ask for.
            retention: how long jobs are kept.
            removal_seconds: how long `remove_expired` may begin further removals.
        """
        self.quarantined: dict[str, Quarantined] = {}
        self.by_key: dict[tuple[str, str], asyncio.Future[LiveJob]] = {}
        self._store = store
        self._limits = limits
        self._retention = retention
        self._removal_seconds = removal_seconds
        self._jobs: dict[str, LiveJob] = {}
        self._files_left: set[str] = set()
        """Jobs that are removed, but for some of their files."""
        self._threads = ThreadPoolExecutor(8, thread_name_prefix="store")

    def __iter__(self) -> Iterator[LiveJob]:
        return iter(self._jobs.values())

    def get(self, job_id: str) -> LiveJob | None:
        """The job with that id, if there is one."""
        return self._jobs.get(job_id)

    async def load(self) -> None:
        """Read all jobs from storage."""
        for found in await self._in_thread(lambda: list(map(self._within_limits, self._store.all()))):
            if isinstance(found, Quarantined):
                _log.error("job %s is quarantined: %s", found.id, found.reason)
                self.quarantined[found.id] = found
            else:
                self._add(LiveJob(*found))

    async def create(self, manifest: JobManifest) -> LiveJob:
        """Add a job: it is on storage when this returns.

        Raises:
            RPGError: if it cannot be written; there is no such job then.
        """
        await self._in_thread(lambda: self._store.create(manifest))
        job = LiveJob(manifest, JobProgress(JobState.queued, made={}))
        self._add(job)
        return job

    async def save(self, job: LiveJob) -> None:
        """Write a job's state. Where that fails, it is tried again later, since nothing depends on it now."""
        async with job.saving:
            if job.id not in self._jobs:
                return
            job.dirty = False
            # More models are recorded while this copy is written.
            progress = replace(job.progress, made=dict(job.progress.made))
            try:
                await self._in_thread(lambda: self._store.save(job.id, progress))
            except (RPGError, OSError) as error:
                job.dirty = True
                _log.error("%s", one_line(error))
            except asyncio.CancelledError:
                job.dirty = True
                raise

    async def write(self, job: LiveJob, progress: JobProgress) -> bool:
        """Write the state that a job is about to have, before anybody is told of it.

        Returns:
            Whether it is on storage; if not, the job's state has changed meanwhile, and nothing was written.

        Raises:
            RPGError: if it cannot be written.
        """
        state = job.progress.state
        async with job.saving:
            if job.progress.state != state or job.id not in self._jobs:
                return False
            await self._in_thread(lambda: self._store.save(job.id, progress))
        return True

    async def save_changed(self) -> None:
        """Write the states of all jobs that have changed since they were written."""
        for job in [job for job in self if job.dirty]:
            await self.save(job)

    async def remove_partial_files(self, job: LiveJob) -> None:
        """Remove what killed replicas left unfinished of a job that has ended."""
        await self._in_thread(lambda: self._store.remove_partial_files(job.id))

    async def remove(self, job: LiveJob) -> bool:
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
                self.by_key.pop((job.manifest.owner, key), None)
            try:
                await self._in_thread(lambda: self._store.mark_removed(job.id))
            except RPGError:
                self._add(job)
                raise
        await self._remove_files(job.id)
        return True

    async def remove_quarantined(self, job_id: str) -> None:
        """Remove a job that cannot be read.

        Raises:
            RPGError: if the storage refuses; the job stays.
        """
        await self._in_thread(lambda: self._store.mark_removed(job_id))
        self.quarantined.pop(job_id, None)
        await self._remove_files(job_id)

    async def remove_expired(self) -> None:
        """Remove the jobs that are not to be kept, as many as there is time for, and files that were left."""
        start = time.monotonic()
        failures: list[str] = []
        for job, ended_at in [(job, job.ended_at) for job in self._expired()]:
            try:
                # While others were removed, this job may have been revived, and may even have ended again.
                if job.ended_at == ended_at:
                    await self.remove(job)
            except RPGError as error:
                failures.append(one_line(error))
            if time.monotonic() - start > self._removal_seconds:
                break
        if failures:
            _log.error("%d jobs were to be removed and stay for now: %s", len(failures), failures[0])
        for job_id in list(self._files_left):
            await self._remove_files(job_id)

    def close(self) -> None:
        """Wait for what is being written, and end the threads."""
        self._threads.shutdown()

    def _within_limits(
        self, found: tuple[JobManifest, JobProgress] | Quarantined
    ) -> tuple[JobManifest, JobProgress] | Quarantined:
        """What was found, or why it is not taken up: more is asked for than a caller may ask for."""
        if isinstance(found, Quarantined) or found[1].state.is_end:
            return found
        job = found[0].job
        excess = beyond_limits(job.models, len(job.conditions or []), job.sampling.steps, self._limits)
        return found if excess is None else Quarantined(found[0].id, excess)

    def _add(self, job: LiveJob) -> None:
        self._jobs[job.id] = job
        owner, key = job.manifest.owner, job.manifest.idempotency_key
        if key is not None and (owner, key) not in self.by_key:
            known: asyncio.Future[LiveJob] = asyncio.get_running_loop().create_future()
            known.set_result(job)
            self.by_key[owner, key] = known

    def _expired(self) -> list[LiveJob]:
        now = time.monotonic()
        ended = [(now - job.ended_at, job) for job in self if job.ended_at is not None]
        kept_bytes = 0
        expired = []
        for age, job in sorted(ended, key=lambda each: each[0]):
            kept_bytes += job.bytes
            if age > self._retention.days * 86400 or kept_bytes > self._retention.gigabytes * 1e9:
                expired.append(job)
        return expired

    async def _remove_files(self, job_id: str) -> None:
        """Remove the files of a job that is removed already; where some are left, it is tried again later."""
        self._files_left.discard(job_id)
        try:
            await self._in_thread(lambda: self._store.remove_files(job_id))
        except RPGError as error:
            _log.error("%s; it is tried again", error)
            self._files_left.add(job_id)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        waiting: Awaitable[T] = asyncio.get_running_loop().run_in_executor(self._threads, function)
        return await waiting
