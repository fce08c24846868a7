"""The calls of the HTTP front: each is answered with what goes over the wire.

Every call may raise a `ProblemError`, with the status and the line that the caller is answered with.
"""

import math
from typing import Any

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
    UnderstoodDescription,
)
from serve.dispatch.caller import Caller
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.live_job import LiveJob, understood_view
from serve.dispatch.records import Made
from serve.dispatch.scheduler import GeneratorScheduler
from serve.errors import ProblemError


class DispatcherAPI:
    """What the front may ask of the dispatcher."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher

    async def submit(self, caller: Caller, request: JobRequest, key: str | None) -> Job:
        """Accept a job; `key` is the Idempotency-Key."""
        return (await self.dispatcher.submit(caller, request, key)).view()

    async def generate(
        self, caller: Caller, request: JobRequest, *, seconds: float
    ) -> tuple[Job, ModelFile | None]:
        """Accept a job for one model; the job once it has ended, or after so many seconds, and its model.

        It is one call, because each takes the front and this process several milliseconds.
        """
        job = await self.dispatcher.submit(caller, request, None)
        await job.wait_for_end(seconds)
        made = job.progress.made.get(0)
        return job.view(), None if made is None else _model(job, made)

    async def job(self, caller: Caller, job_id: str) -> Job:
        """One job."""
        return self.dispatcher.job(caller, job_id).view()

    async def jobs(
        self, caller: Caller, state: JobState | None, generator: str | None, limit: int, after: str | None
    ) -> JobPage:
        """A page of the caller's jobs, newest first: at most `limit`, beginning after the job `after`."""
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
        quarantined = self.dispatcher.quarantined.values() if caller.is_admin else []
        return JobPage(
            jobs=[job.view() for job in found[:limit]],
            next=found[limit - 1].id if len(found) > limit else None,
            quarantined=[QuarantinedJob(id=each.id, reason=each.reason) for each in quarantined],
        )

    async def wait_for_change(self, caller: Caller, job_id: str, version: int, *, seconds: float) -> Job:
        """The job as soon as its version is another than `version`, or after so many seconds."""
        job = self.dispatcher.job(caller, job_id)
        await job.wait_for_change(version, seconds)
        # Meanwhile it may have been removed.
        return self.dispatcher.job(caller, job_id).view()

    async def models(self, caller: Caller, job_id: str, start: int, limit: int) -> ModelPage:
        """A page of a job's finished models: at most `limit`, beginning with index `start`."""
        job = self.dispatcher.job(caller, job_id)
        made = job.progress.made
        indices = sorted(index for index in made if index >= start)
        return ModelPage(
            models=[_model(job, made[i]) for i in indices[:limit]],
            next=indices[limit] if len(indices) > limit else None,
        )

    async def model(self, caller: Caller, job_id: str, index: int) -> ModelFile:
        """One finished model."""
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
        """Cancel a job that has not ended, or remove one that has (None)."""
        job = await self.dispatcher.cancel_or_remove(caller, job_id)
        return None if job is None else job.view()

    async def generators(self) -> list[GeneratorDetail]:
        """All generators that are served, by name."""
        return [_generator(scheduler) for _, scheduler in sorted(self.dispatcher.schedulers.items())]

    async def understand(self, name: str, description: str) -> UnderstoodDescription:
        """What a generator's words model understands of a description."""
        return understood_view(await self.dispatcher.understood(name, description))

    async def centre(self, name: str) -> Centre:
        """A sample of the mean checkpoint that a generator learned from."""
        if name not in self.dispatcher.schedulers:
            raise ProblemError(404, f"no generator '{name}'")
        report = self.dispatcher.schedulers[name].report
        if report is None:
            raise ProblemError(503, f"generator '{name}' has not started yet", headers={"Retry-After": "1"})
        numels = {tensor: math.prod(shape) for tensor, shape, _ in report.tensors}
        tensors = [
            CentreTensor(name=tensor, numel=numels[tensor], values=values) for tensor, values in report.centre
        ]
        return Centre(digest=report.digest, tensors=tensors)

    async def ping(self) -> None:
        """Answer, and so show that the dispatcher runs."""


def _model(job: LiveJob, made: Made) -> ModelFile:
    return ModelFile(
        index=made.model,
        sha256=made.sha256,
        bytes=made.bytes,
        accuracy=made.accuracy,
        similarity=made.similarity,
        metrics=made.metrics,
        failure=made.failure,
        pack=made.pack,
        offset=made.offset,
        description=job.manifest.description_of(made.model),
    )


def _generator(scheduler: GeneratorScheduler) -> GeneratorDetail:
    report, served = scheduler.report, scheduler.served
    keys = ("digest", "device", "tokens", "token_size", "parameters", "model_bytes", "card", "classes")
    reported: dict[str, Any] = {key: getattr(report, key, None) for key in keys}
    reported["layout"] = report and [
        TensorInfo(name=tensor, shape=list(shape), dtype=dtype) for tensor, shape, dtype in report.tensors
    ]
    return GeneratorDetail(
        name=served.name,
        ready=report is not None,
        condition=served.config.condition.kind,
        condition_size=served.config.condition.size,
        descriptions=served.takes_descriptions,
        evaluates=served.evaluates,
        sampling=served.config.sampling,
        models_per_second=scheduler.speed,
        **reported,
    )
