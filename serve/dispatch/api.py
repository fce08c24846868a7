"""What the HTTP front asks of the dispatcher: plain questions, answered with what goes over the wire."""

import math
from typing import Any, Protocol

from rpg.client.schema import (
    Centre,
    CentreTensor,
    GeneratorDetail,
    Job,
    JobPage,
    JobRequest,
    JobState,
    ModelFile,
    ModelPage,
    QuarantinedJob,
    TensorInfo,
)
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.live_job import LiveJob
from serve.dispatch.records import Made
from serve.dispatch.scheduler import Feed
from serve.http.auth import Caller
from serve.http.problems import ProblemError


class Desk(Protocol):
    """Every method may raise a `ProblemError`."""

    async def submit(self, caller: Caller, request: JobRequest, key: str | None) -> Job:
        """Accept a job; `key` is the Idempotency-Key."""
        ...

    async def job(self, caller: Caller, job_id: str) -> Job:
        """One job."""
        ...

    async def jobs(
        self, caller: Caller, state: JobState | None, generator: str | None, limit: int, after: str | None
    ) -> JobPage:
        """A page of jobs."""
        ...

    async def news(self, caller: Caller, job_id: str, version: int, seconds: float) -> Job:
        """The job as soon as its version is another than `version`, or after so many seconds."""
        ...

    async def models(self, caller: Caller, job_id: str, start: int, limit: int) -> ModelPage:
        """A page of a job's finished models."""
        ...

    async def model(self, caller: Caller, job_id: str, index: int) -> ModelFile:
        """One finished model."""
        ...

    async def cancel_or_remove(self, caller: Caller, job_id: str) -> Job | None:
        """Cancel a job that has not ended, or remove one that has (None)."""
        ...

    async def generators(self) -> list[GeneratorDetail]:
        """All that are served."""
        ...

    async def centre(self, name: str) -> Centre:
        """A sample of a generator's centre."""
        ...

    async def ping(self) -> None:
        """Answer."""
        ...


class DispatcherDesk:
    """The desk of a dispatcher in this process."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher

    async def submit(self, caller: Caller, request: JobRequest, key: str | None) -> Job:
        """See `Desk`."""
        return (await self.dispatcher.submit(caller, request, key)).view()

    async def job(self, caller: Caller, job_id: str) -> Job:
        """See `Desk`."""
        return self.dispatcher.job(caller, job_id).view()

    async def jobs(
        self, caller: Caller, state: JobState | None, generator: str | None, limit: int, after: str | None
    ) -> JobPage:
        """See `Desk`."""
        jobs = self.dispatcher.jobs(caller)
        if after is not None:
            place = next((i for i, job in enumerate(jobs) if job.id == after), None)
            if place is None:
                raise ProblemError(422, f"after: no job '{after}'")
            jobs = jobs[place + 1 :]
        found = [
            job
            for job in jobs
            if state in (None, job.progress.state) and generator in (None, job.manifest.generator)
        ]
        hidden = self.dispatcher.quarantined.values() if caller.is_admin else []
        return JobPage(
            jobs=[job.view() for job in found[:limit]],
            next=found[limit - 1].id if len(found) > limit else None,
            quarantined=[QuarantinedJob(id=each.id, reason=each.reason) for each in hidden],
        )

    async def news(self, caller: Caller, job_id: str, version: int, seconds: float) -> Job:
        """See `Desk`."""
        job = self.dispatcher.job(caller, job_id)
        await job.news(version, seconds)
        return self.dispatcher.job(caller, job_id).view()

    async def models(self, caller: Caller, job_id: str, start: int, limit: int) -> ModelPage:
        """See `Desk`."""
        job = self.dispatcher.job(caller, job_id)
        made = job.progress.made
        indices = sorted(index for index in made if index >= start)
        return ModelPage(
            models=[_model(job, made[i]) for i in indices[:limit]],
            next=indices[limit] if len(indices) > limit else None,
        )

    async def model(self, caller: Caller, job_id: str, index: int) -> ModelFile:
        """See `Desk`."""
        job = self.dispatcher.job(caller, job_id)
        made = job.progress.made.get(index)
        if made is not None:
            return _model(job, made)
        models = len(job.manifest.job)
        if index >= models:
            raise ProblemError(404, f"job {job_id} has {models} models: no model {index}")
        if job.has_ended:
            raise ProblemError(404, f"job {job_id} has {job.progress.state}: model {index} was not made")
        raise ProblemError(
            409, f"model {index} of job {job_id} is not made yet", headers={"Retry-After": "1"}
        )

    async def cancel_or_remove(self, caller: Caller, job_id: str) -> Job | None:
        """See `Desk`."""
        job = await self.dispatcher.cancel_or_remove(caller, job_id)
        return None if job is None else job.view()

    async def generators(self) -> list[GeneratorDetail]:
        """See `Desk`."""
        return [_generator(feed) for _, feed in sorted(self.dispatcher.feeds.items())]

    async def centre(self, name: str) -> Centre:
        """See `Desk`."""
        if name not in self.dispatcher.feeds:
            raise ProblemError(404, f"no generator '{name}'")
        known = self.dispatcher.feeds[name].description
        if known is None:
            raise ProblemError(503, f"generator '{name}' has not started yet", headers={"Retry-After": "1"})
        numels = {tensor: math.prod(shape) for tensor, shape, _ in known.tensors}
        tensors = [
            CentreTensor(name=tensor, numel=numels[tensor], values=values) for tensor, values in known.centre
        ]
        return Centre(digest=known.digest, tensors=tensors)

    async def ping(self) -> None:
        """See `Desk`."""


def _model(job: LiveJob, made: Made) -> ModelFile:
    return ModelFile(
        index=made.model,
        sha256=made.sha256,
        bytes=made.bytes,
        accuracy=made.accuracy,
        similarity=made.similarity,
        description=job.manifest.description_of(made.model),
    )


def _generator(feed: Feed) -> GeneratorDetail:
    known, config = feed.description, feed.served.config
    keys = ("digest", "device", "tokens", "token_size", "parameters", "model_bytes", "card")
    rest: dict[str, Any] = {key: getattr(known, key, None) for key in keys}
    rest["layout"] = known and [
        TensorInfo(name=tensor, shape=list(shape), dtype=dtype) for tensor, shape, dtype in known.tensors
    ]
    return GeneratorDetail(
        name=feed.served.name,
        ready=known is not None,
        condition=config.condition.kind,
        condition_size=config.condition.size,
        descriptions=feed.served.reads,
        evaluates=feed.served.evaluates,
        sampling=config.sampling,
        models_per_second=feed.speed,
        **rest,
    )
