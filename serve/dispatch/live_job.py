"""A job while the service runs: what is left to make, which leases make it, how fast that goes."""

import asyncio
import heapq
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

from rpg.client.schema import Job, JobState, UnderstoodClass, UnderstoodDescription
from rpg.words.properties import CLASSES
from rpg.words.understood import Understood
from serve.dispatch.records import JobManifest, JobProgress, Made


class LiveJob:
    """Manifest and progress, with what is known only while the service runs.

    Attributes:
        version: counts changes.
        leases: tasks that wait for models of it.
        losses: replicas lost since a model was finished.
        dirty: whether `progress` has changed since it was written.
        saving: held while the job is written or removed.
        bytes: of all finished models.
        note: what it waits for.
        ended_at: when it ended, on the monotonic clock, because the system's clock may be set while it runs.
    """

    def __init__(self, manifest: JobManifest, progress: JobProgress) -> None:
        self.manifest = manifest
        self.progress = progress
        self.version = 0
        self.leases: set[asyncio.Task[None]] = set()
        self.losses = 0
        self.dirty = False
        self.ended_at: float | None = None
        self.saving = asyncio.Lock()
        self.note: str | None = None
        self.bytes = 0
        self._judged, self._accuracy = 0, 0.0
        for made in progress.made.values():
            self._count(made)
        self._changed = asyncio.Event()
        self._began: float | None = None
        self._made_here = 0
        self._pending: list[int] = []
        if progress.ended is not None:
            # Where the clock was set back, the job ended now and not in the future.
            self.ended_at = time.monotonic() - max(0.0, time.time() - progress.ended)
        self.refill()

    @property
    def id(self) -> str:
        """The job's id."""
        return self.manifest.id

    @property
    def age(self) -> float:
        """Seconds since it was accepted; 0 where the clock was set back meanwhile."""
        return max(0.0, time.time() - self.manifest.created)

    @property
    def has_ended(self) -> bool:
        """Whether it has succeeded, failed or been cancelled."""
        return self.progress.state.is_end

    @property
    def remaining(self) -> int:
        """Models that are still to be made."""
        return 0 if self.has_ended else self.manifest.job.models - len(self.progress.made)

    @property
    def has_waiting_models(self) -> bool:
        """Whether there are models to be made that no lease has."""
        return bool(self._pending) and not self.has_ended

    def refill(self) -> None:
        """Let every model that is not made wait for a lease. Of a job that has ended, none waits."""
        models = 0 if self.has_ended else self.manifest.job.models
        self._pending = [i for i in range(models) if i not in self.progress.made]

    def take(self, count: int) -> tuple[int, ...]:
        """Take up to `count` waiting models for a lease, the lowest indices first."""
        taken = tuple(heapq.heappop(self._pending) for _ in range(min(count, len(self._pending))))
        if taken and self.progress.state == JobState.queued:
            self.progress.state = JobState.running
            self.progress.started = self.progress.started or time.time()
            self.dirty = True
            self.notify()
        if self._began is None:
            self._began = time.monotonic()
        return taken

    def put_back(self, models: Iterable[int]) -> None:
        """Let those of a lease's models wait again that were not made."""
        for model in models:
            if model not in self.progress.made and model not in self._pending:
                heapq.heappush(self._pending, model)

    def record(self, made: Iterable[Made]) -> None:
        """Add finished models."""
        for each in made:
            if each.model not in self.progress.made:
                self._made_here += 1
                self._count(each)
            self.progress.made[each.model] = each
        self.losses = 0
        self.note = None
        self.dirty = True
        self.notify()

    def _count(self, made: Made) -> None:
        self.bytes += made.bytes
        if made.accuracy is not None:
            self._judged += 1
            self._accuracy += made.accuracy

    def end(self, state: JobState, error: str | None = None) -> None:
        """Mark the job as ended."""
        self.progress.state = state
        self.progress.error = error
        self.progress.ended = time.time()
        self.ended_at = time.monotonic()
        self.dirty = True
        self.notify()

    def cancelled(self) -> JobProgress:
        """The progress that the job has once it is cancelled."""
        made = dict(self.progress.made)
        return replace(self.progress, state=JobState.cancelled, ended=time.time(), made=made)

    def revived(self) -> JobProgress:
        """The progress that a failed job has once it is tried again, keeping what was made."""
        made = dict(self.progress.made)
        # Without a model, nothing binds the job to the generator's version that it failed with.
        digest = self.progress.digest if made else None
        queued = JobState.queued
        return replace(self.progress, state=queued, error=None, ended=None, digest=digest, made=made)

    def revive(self) -> None:
        """Try a failed job once more, keeping what was made."""
        self.progress = self.revived()
        self.ended_at, self.losses, self.dirty = None, 0, True
        self.refill()
        self.notify()

    def notify(self) -> None:
        """Count a change, and wake all who wait for one."""
        self.version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, version: int, seconds: float) -> None:
        """Wait until the job's version is another than `version`, for so many seconds at most."""
        if self.version == version:
            try:
                await asyncio.wait_for(self._changed.wait(), seconds)
            except TimeoutError:
                return

    async def wait_for_end(self, seconds: float) -> None:
        """Wait until the job has ended, for so many seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.has_ended:
                    await self._changed.wait()

    def view(self) -> Job:
        """The job as callers see it."""
        manifest, progress = self.manifest, self.progress
        rate = None
        if self._began is not None and self._made_here and not self.has_ended:
            rate = self._made_here / max(time.monotonic() - self._began, 1e-3)
        return Job(
            id=manifest.id,
            owner=manifest.owner,
            generator=manifest.generator,
            digest=progress.digest,
            state=progress.state,
            error=progress.error or self.note,
            priority=manifest.priority,
            seed=manifest.job.seed,
            sampling=manifest.job.sampling,
            dtype=manifest.job.dtype,
            evaluate=manifest.evaluate,
            understood=None if manifest.understood is None else [*map(understood_view, manifest.understood)],
            accuracy=self._accuracy / self._judged if self._judged else None,
            models=manifest.job.models,
            number=manifest.job.number,
            finished=len(progress.made),
            bytes=self.bytes,
            created=manifest.created,
            started=progress.started,
            ended=progress.ended,
            models_per_second=rate,
            seconds_left=self.remaining / rate if rate else None,
            version=self.version,
        )


def understood_view(understood: Understood) -> UnderstoodDescription:
    """What was understood of a description, as callers see it."""
    classes = [
        UnderstoodClass(name=name, probability=probability, meant=bool(bit))
        for name, probability, bit in zip(CLASSES, understood.probabilities, understood.bits, strict=True)
    ]
    return UnderstoodDescription(classes=classes, sureness=understood.sureness, is_sure=understood.is_sure)
