"""The dispatcher's makers and the front's desk where they are in other processes: by handles of Ray Serve."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from rpg.client.schema import (
    Centre,
    GeneratorDetail,
    Job,
    JobPage,
    JobRequest,
    JobState,
    ModelFile,
    ModelPage,
)
from serve.dispatch.lease import Description, Embedded, Lease
from serve.dispatch.records import Made
from serve.http.auth import Caller
from serve.http.problems import ProblemError

_PATIENCE_SECONDS = 30.0


class HandleMaker:
    """All replicas of a generator; see `serve.dispatch.lease.Maker`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def make(self, lease: Lease) -> AsyncIterator[list[Made] | str]:
        """See `Maker`."""
        stream = self._handle.options(method_name="make", stream=True)
        response = cast(DeploymentResponseGenerator[Any], stream.remote(lease))
        whole = False
        try:
            async for event in response:
                yield event
            whole = True
        finally:
            if not whole:
                response.cancel()  # type: ignore[no-untyped-call]

    async def embed(self, descriptions: list[str]) -> Embedded | str:
        """See `Maker`."""
        embedded: Embedded | str = await self._handle.options(method_name="embed").remote(descriptions)
        return embedded

    async def describe(self) -> Description:
        """See `Maker`."""
        description: Description = await self._handle.options(method_name="describe").remote()
        return description


class HandleDesk:
    """The dispatcher's desk in its own process; see `serve.dispatch.api.Desk`."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def submit(self, caller: Caller, request: JobRequest, key: str | None) -> Job:
        """See `Desk`."""
        job: Job = await self._ask("submit", caller, request, key)
        return job

    async def job(self, caller: Caller, job_id: str) -> Job:
        """See `Desk`."""
        job: Job = await self._ask("job", caller, job_id)
        return job

    async def jobs(
        self, caller: Caller, state: JobState | None, generator: str | None, limit: int, after: str | None
    ) -> JobPage:
        """See `Desk`."""
        jobs: JobPage = await self._ask("jobs", caller, state, generator, limit, after)
        return jobs

    async def news(self, caller: Caller, job_id: str, version: int, seconds: float) -> Job:
        """See `Desk`."""
        job: Job = await self._ask("news", caller, job_id, version, seconds, patience=seconds)
        return job

    async def models(self, caller: Caller, job_id: str, start: int, limit: int) -> ModelPage:
        """See `Desk`."""
        models: ModelPage = await self._ask("models", caller, job_id, start, limit)
        return models

    async def model(self, caller: Caller, job_id: str, index: int) -> ModelFile:
        """See `Desk`."""
        model: ModelFile = await self._ask("model", caller, job_id, index)
        return model

    async def cancel_or_remove(self, caller: Caller, job_id: str) -> Job | None:
        """See `Desk`."""
        job: Job | None = await self._ask("cancel_or_remove", caller, job_id)
        return job

    async def generators(self) -> list[GeneratorDetail]:
        """See `Desk`."""
        generators: list[GeneratorDetail] = await self._ask("generators")
        return generators

    async def centre(self, name: str) -> Centre:
        """See `Desk`."""
        centre: Centre = await self._ask("centre", name)
        return centre

    async def ping(self) -> None:
        """See `Desk`."""
        await self._ask("ping")

    async def _ask(self, method: str, *arguments: object, patience: float = 0.0) -> Any:
        response = self._handle.options(method_name=method).remote(*arguments)
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS + patience):
                return await response
        except RayTaskError as error:
            if isinstance(error.cause, ProblemError):
                raise error.cause from None
            raise
        except (RayError, RayServeException, TimeoutError) as error:
            # Perhaps after it was done: an Idempotency-Key makes it safe to ask for a job again.
            raise ProblemError(
                503, "the service is starting again; try once more", headers={"Retry-After": "1"}
            ) from error
