"""The routes of the HTTP interface: jobs, their models, generators, and the service's health."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer

from rpg.client.schema import (
    Centre,
    CompanionFile,
    FileName,
    GenerateRequest,
    GeneratorDetail,
    GeneratorList,
    Health,
    Job,
    JobPage,
    JobRequest,
    JobState,
    ModelFile,
    ModelPage,
    UnderstandRequest,
    UnderstoodDescription,
)
from serve.dispatch.api import DispatcherAPI
from serve.dispatch.caller import Caller
from serve.dispatch.store import JobStore
from serve.errors import ProblemError
from serve.http.downloads import (
    MODEL_TYPE,
    TAR_TYPE,
    StoredModel,
    archive_response,
    file_response,
    model_response,
)
from serve.http.events import JobEvents
from serve.http.front_deadline import GENERATE_PATH, GENERATE_SECONDS
from serve.http.problems import problem_responses

_PAGE = 1000
"""Jobs or models that one answer lists at most."""
_METRICS_TYPE = "text/plain; version=0.0.4"
_EVENTS_TYPE = "text/event-stream"
_UNDERSTOOD_HEADER = "RPG-Understood"
"""Where the body is a network: JSON of what was understood of the description that it was made for."""


def _caller_with(scope: str) -> Callable[..., Caller]:
    # The middleware has checked the token already. `HTTPBearer` is here for the OpenAPI document alone.
    def caller(request: Request, token: Annotated[Any, Depends(HTTPBearer(auto_error=False))]) -> Caller:
        found: Caller = request.state.caller
        found.require(scope)
        _refuse_unknown_query(request)
        return found

    return caller


def _refuse_unknown_query(request: Request) -> None:
    """Refuse parameters that the route does not have: a misspelt filter would filter nothing."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise ProblemError(422, f"query: unknown parameter '{name}'; expected {expected}")


Reader = Annotated[Caller, Depends(_caller_with("read"))]
Submitter = Annotated[Caller, Depends(_caller_with("submit"))]
Admin = Annotated[Caller, Depends(_caller_with("admin"))]
JobId = Annotated[str, Path(description="a job's id")]
Index = Annotated[int, Path(ge=0, description="a model's index in its job")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1, max_length=200, pattern=r"^[!-~]+$",
        description="a repeated request with the same key stands for one job; one that failed is tried again",
    ),
]  # fmt: skip

_EVENT = {
    "type": "object",
    "properties": {
        "event": {"enum": ["progress", "end"]},
        "id": {"type": "string", "description": "the job's version"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


def _binary(description: str, *media_types: str) -> dict[str, Any]:
    schema = {"schema": {"type": "string", "format": "binary"}}
    return {"description": description, "content": {media_type: schema for media_type in media_types}}


def add_jobs(app: FastAPI, api: DispatcherAPI, store: JobStore, events: JobEvents) -> None:
    """Add the routes that submit, list, follow and end jobs."""

    @app.post(
        "/v1/jobs", status_code=202, response_model=Job, responses=problem_responses(422, 429, 507),
        operation_id="submit_job",
    )  # fmt: skip
    async def submit(
        request: JobRequest, response: Response, caller: Submitter, idempotency_key: IdempotencyKey = None
    ) -> Job:
        """Ask for models. The job is durable when this is answered."""
        job = await api.submit(caller, request, idempotency_key)
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return job

    @app.get("/v1/jobs", response_model=JobPage, responses=problem_responses(422), operation_id="list_jobs")
    async def jobs(
        caller: Reader,
        state: JobState | None = None,
        generator: str | None = None,
        limit: Annotated[int, Query(ge=1, le=_PAGE)] = 100,
        after: Annotated[str | None, Query(description="`next` of the page before")] = None,
    ) -> JobPage:
        """Jobs, newest first."""
        return await api.jobs(caller, state, generator, limit, after)

    @app.get(
        "/v1/jobs/{id}",
        response_model=Job,
        responses=problem_responses(404, 409, 422),
        operation_id="get_job",
    )
    async def job(caller: Reader, id: JobId) -> Job:
        """One job: state, progress, rate, time left."""
        return await api.job(caller, id)

    @app.delete(
        "/v1/jobs/{id}", response_model=Job, operation_id="delete_job",
        responses={**problem_responses(404, 409, 422), 204: {"description": "It had ended, and is removed"}},
    )  # fmt: skip
    async def delete(caller: Submitter, id: JobId) -> Any:
        """Cancel a job, within one denoising batch; remove one that has ended, with its models."""
        left = await api.cancel_or_remove(caller, id)
        return Response(status_code=204) if left is None else left

    @app.get(
        "/v1/jobs/{id}/events", response_class=StreamingResponse, operation_id="job_events",
        responses={
            **problem_responses(404, 409, 422, 429),
            200: {
                "description": "`progress` events and a last `end`; their data is the job",
                "content": {_EVENTS_TYPE: {"schema": _EVENT}},
            },
        },
    )  # fmt: skip
    async def job_events(caller: Reader, id: JobId) -> StreamingResponse:
        """Server-sent events of a job's progress, until it ends. The more listen, the fewer each gets."""
        now = await api.job(caller, id)
        events.check_room()
        return StreamingResponse(
            events.of(caller, now), media_type=_EVENTS_TYPE, headers={"Cache-Control": "no-store"}
        )

    @app.post(
        GENERATE_PATH, response_class=Response, operation_id="generate",
        responses={
            **problem_responses(422, 429, 500, 507),
            200: _binary("The network, as `get_model` answers", MODEL_TYPE, TAR_TYPE),
            202: {
                "description": f"Not made within {GENERATE_SECONDS:.0f} s: the job that goes on",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Job"}}},
            },
        },
    )  # fmt: skip
    async def generate(request: GenerateRequest, caller: Submitter) -> Response:
        """Make one model and answer with it. It is a job like any other, and stays as one.

        Where a description was understood as classes, the header RPG-Understood tells these, in JSON
        (UnderstoodDescription).
        """
        asked = request.model_dump(exclude={"condition", "description"})
        conditions = None if request.condition is None else [request.condition]
        descriptions = None if request.description is None else [request.description]
        whole = JobRequest(**asked, conditions=conditions, descriptions=descriptions)
        job, model = await api.generate(caller, whole, seconds=GENERATE_SECONDS)
        headers = {"Location": f"/v1/jobs/{job.id}"}
        if job.understood:
            headers[_UNDERSTOOD_HEADER] = job.understood[0].model_dump_json()
        if job.state == JobState.failed:
            raise ProblemError(500, job.error or "the job failed")
        if job.state == JobState.cancelled:
            raise ProblemError(500, f"job {job.id} was cancelled")
        if model is None:
            return JSONResponse(job.model_dump(mode="json"), 202, headers)
        stored = await asyncio.to_thread(_stored, store, job, model)
        response = await asyncio.to_thread(model_response, stored, job.created, {}, "")
        response.headers.update(headers)
        return response


def add_models(app: FastAPI, api: DispatcherAPI, store: JobStore) -> None:
    """Add the routes that list and download finished models."""

    @app.get(
        "/v1/jobs/{id}/models", response_model=ModelPage, responses=problem_responses(404, 409, 422),
        operation_id="list_models",
    )  # fmt: skip
    async def models(
        caller: Reader,
        id: JobId,
        start: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=_PAGE)] = _PAGE,
    ) -> ModelPage:
        """The finished models of a job, with the SHA-256 of their files."""
        job, page = await asyncio.gather(api.job(caller, id), api.models(caller, id, start, limit))
        companions = await asyncio.to_thread(store.companions, job.digest)
        if not companions:
            return page
        beside = [
            CompanionFile(name=name, sha256=companions.digests[name], bytes=len(content))
            for name, content in companions.files.items()
        ]
        return page.model_copy(update={"weights": companions.weights_name, "companions": beside})

    @app.get(
        "/v1/jobs/{id}/models/{index}", response_class=Response, operation_id="get_model",
        responses={
            **problem_responses(404, 409, 416, 422),
            200: _binary(
                "The network: a .safetensors file, whose ETag is its SHA-256, or a tar of its directory",
                MODEL_TYPE, TAR_TYPE,
            ),
            206: _binary("The part that was asked for", MODEL_TYPE, TAR_TYPE),
            304: {"description": "If-None-Match named it"},
        },
    )  # fmt: skip
    async def model(caller: Reader, id: JobId, index: Index, request: Request) -> Response:
        """One finished model; understands Range, If-Range and If-None-Match."""
        job, found = await asyncio.gather(api.job(caller, id), api.model(caller, id, index))
        stored = await asyncio.to_thread(_stored, store, job, found)
        return await asyncio.to_thread(model_response, stored, job.created, request.headers, f"{id}_")

    @app.get(
        "/v1/jobs/{id}/models/{index}/files/{name}", response_class=Response, operation_id="get_model_file",
        responses={
            **problem_responses(404, 409, 416, 422),
            200: _binary("The file; its ETag is its SHA-256", MODEL_TYPE),
            206: _binary("The part that was asked for", MODEL_TYPE),
            304: {"description": "If-None-Match named it"},
        },
    )  # fmt: skip
    async def model_file(
        caller: Reader, id: JobId, index: Index, name: FileName, request: Request
    ) -> Response:
        """One file of a finished model; understands Range, If-Range and If-None-Match."""
        job, found = await asyncio.gather(api.job(caller, id), api.model(caller, id, index))
        stored = await asyncio.to_thread(_stored, store, job, found)
        return await asyncio.to_thread(file_response, stored, name, request.headers)

    @app.get(
        "/v1/jobs/{id}/archive", response_class=StreamingResponse, operation_id="get_archive",
        responses={**problem_responses(404, 409, 422), 200: _binary("A tar stream of the models", TAR_TYPE)},
    )  # fmt: skip
    async def archive(caller: Reader, id: JobId) -> Response:
        """All models of a job that has ended."""
        job = await api.job(caller, id)
        if not job.state.is_end:
            raise ProblemError(409, f"job {id} has not ended", headers={"Retry-After": "5"})
        found: list[ModelFile] = []
        start: int | None = 0
        while start is not None:
            page = await api.models(caller, id, start, 10 * _PAGE)
            found += page.models
            start = page.next
        models = await asyncio.to_thread(lambda: [_stored(store, job, each) for each in found])
        return archive_response(models, job.created, id)


def _stored(store: JobStore, job: Job, model: ModelFile) -> StoredModel:
    name = store.model(job.id, model.index).name
    if model.pack is None:
        open_file = partial(store.open_model, job.id, model.index)
    else:
        open_file = partial(store.open_packed, job.id, model.pack, model.offset, model.bytes)
    return StoredModel(name, open_file, model, store.companions(job.digest))


def add_generators(app: FastAPI, api: DispatcherAPI) -> None:
    """Add the routes that describe generators."""

    @app.get(
        "/v1/generators",
        response_model=GeneratorList,
        responses=problem_responses(),
        operation_id="list_generators",
    )
    async def generators(caller: Reader) -> GeneratorList:
        """The generators that are served."""
        # The type of the list's items leaves out their cards and layouts.
        return GeneratorList(generators=list(await api.generators()))

    @app.get(
        "/v1/generators/{name}", response_model=GeneratorDetail, responses=problem_responses(404, 422),
        operation_id="get_generator",
    )  # fmt: skip
    async def generator(caller: Reader, name: str) -> GeneratorDetail:
        """One generator: model card, layout, what it asks for, sizes, speed."""
        for each in await api.generators():
            if each.name == name:
                return each
        raise ProblemError(404, f"no generator '{name}'")

    @app.post(
        "/v1/generators/{name}/understand",
        response_model=UnderstoodDescription,
        responses=problem_responses(404, 422),
        operation_id="understand",
    )
    async def understand(caller: Submitter, name: str, request: UnderstandRequest) -> UnderstoodDescription:
        """Which classes a description means, for a generator with a words model. Nothing is made."""
        return await api.understand(name, request.description)

    @app.get(
        "/v1/generators/{name}/centre", response_model=Centre, responses=problem_responses(404, 422),
        operation_id="get_centre",
    )  # fmt: skip
    async def centre(caller: Reader, name: str) -> Centre:
        """A sample of the mean training checkpoint, to compare a network with."""
        return await api.centre(name)


def add_health(app: FastAPI, api: DispatcherAPI, metrics: Callable[[], Awaitable[str]]) -> None:
    """Add the routes that watch the service."""

    @app.get("/healthz", response_model=Health, responses=problem_responses(), operation_id="health")
    async def health() -> Health:
        """Whether jobs are taken. Needs no token."""
        await api.ping()
        return Health(status="ok")

    @app.get(
        "/metrics", response_class=Response, operation_id="metrics",
        responses={
            **problem_responses(),
            200: {
                "description": "Prometheus's text format",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            },
        },
    )  # fmt: skip
    async def figures(caller: Admin) -> Response:
        """Figures for Prometheus, as Ray exports them."""
        return Response(await metrics(), media_type=_METRICS_TYPE)
