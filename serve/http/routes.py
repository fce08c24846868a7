"""The HTTP interface, as a FastAPI application over a `Desk`."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from rpg import __version__
from rpg.client.schema import (
    Centre,
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
)
from serve.config import ServeConfig
from serve.dispatch.api import Desk
from serve.dispatch.store import JobStore
from serve.http.auth import Caller, Gate
from serve.http.auth_middleware import Gatekeeper, problem_response
from serve.http.downloads import MODEL_TYPE, TAR_TYPE, archive_response, model_response
from serve.http.events import EVENTS_TYPE, job_events
from serve.http.page import add_page
from serve.http.problems import MEDIA_TYPE, Problem, ProblemError

_GENERATE_SECONDS = 60.0
_PAGE = 1000
METRICS_TYPE = "text/plain; version=0.0.4"

_log = logging.getLogger("ray.serve")

JobId = Annotated[str, Path(description="a job's id")]
Index = Annotated[int, Path(ge=0, description="a model's index in its job")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1, max_length=200, pattern=r"^[!-~]+$",
        description="a repeated request with the same key stands for one job; one that failed is tried again",
    ),
]  # fmt: skip


def http_app(
    desk: Desk, store: JobStore, config: ServeConfig, metrics: Callable[[], Awaitable[str]]
) -> FastAPI:
    """The application; `store` is where finished models are read, `metrics` tells Prometheus's text."""
    app = FastAPI(
        title="RPG",
        version=__version__,
        description="Generates the weights of neural networks.",
        redoc_url=None,
        docs_url=None,
    )
    app.add_middleware(Gatekeeper, gate=Gate(config), body_bytes=config.limits.body_bytes)
    _add_problems(app)
    _make_document_exact(app, config)
    _add_jobs(app, desk, store)
    _add_downloads(app, desk, store)
    _add_generators(app, desk)
    _add_health(app, desk, metrics)
    add_page(app)
    return app


def _needs(scope: str) -> Callable[..., Caller]:
    # The gatekeeper has read it; this is for OpenAPI.
    def caller(request: Request, token: Annotated[Any, Depends(HTTPBearer(auto_error=False))]) -> Caller:
        found: Caller = request.state.caller
        found.needs(scope)
        _refuse_unknown_query(request)
        return found

    return caller


def _refuse_unknown_query(request: Request) -> None:
    """A misspelt filter would otherwise be no filter at all."""
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "none"
            raise ProblemError(422, f"query: unknown parameter '{name}'; expected {expected}")


Reader = Annotated[Caller, Depends(_needs("read"))]
Submitter = Annotated[Caller, Depends(_needs("submit"))]
Admin = Annotated[Caller, Depends(_needs("admin"))]

_MEANINGS = {
    401: "No valid token",
    403: "The token lacks a scope",
    404: "Not found",
    409: "Not in this state",
    413: "The body is too large",
    416: "No such range",
    422: "Not what was expected",
    429: "Too much is waiting",
    500: "It could not be made",
    503: "The service is starting, or its storage refuses",
    507: "The storage is full",
}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems that a call may be answered with, for OpenAPI; those of any call are added."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    every = (400, 401, 403, 413, 422, 503)
    return {
        s: {"description": _MEANINGS.get(s, "Bad request"), "content": content} for s in (*every, *statuses)
    }


_EVENT = {
    "type": "object",
    "properties": {
        "event": {"enum": ["progress", "end"]},
        "id": {"type": "string", "description": "the job's version"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}


def _binary(description: str, media_type: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {media_type: {"schema": {"type": "string", "format": "binary"}}},
    }


def _add_jobs(app: FastAPI, desk: Desk, store: JobStore) -> None:
    @app.post(
        "/v1/jobs", status_code=202, response_model=Job, responses=_problems(422, 429, 507),
        operation_id="submit_job",
    )  # fmt: skip
    async def submit(
        request: JobRequest, response: Response, caller: Submitter, idempotency_key: IdempotencyKey = None
    ) -> Job:
        """Ask for models. The job is durable when this is answered."""
        job = await desk.submit(caller, request, idempotency_key)
        response.headers["Location"] = f"/v1/jobs/{job.id}"
        return job

    @app.get("/v1/jobs", response_model=JobPage, responses=_problems(422), operation_id="list_jobs")
    async def jobs(
        caller: Reader,
        state: JobState | None = None,
        generator: str | None = None,
        limit: Annotated[int, Query(ge=1, le=_PAGE)] = 100,
        after: Annotated[str | None, Query(description="`next` of the page before")] = None,
    ) -> JobPage:
        """Jobs, newest first."""
        return await desk.jobs(caller, state, generator, limit, after)

    @app.get("/v1/jobs/{id}", response_model=Job, responses=_problems(404, 409, 422), operation_id="get_job")
    async def job(caller: Reader, id: JobId) -> Job:
        """One job: state, progress, rate, time left."""
        return await desk.job(caller, id)

    @app.delete(
        "/v1/jobs/{id}", response_model=Job, operation_id="delete_job",
        responses={**_problems(404, 409, 422), 204: {"description": "It had ended, and is removed"}},
    )  # fmt: skip
    async def delete(caller: Submitter, id: JobId) -> Any:
        """Cancel a job, within one denoising batch; remove one that has ended, with its models."""
        left = await desk.cancel_or_remove(caller, id)
        return Response(status_code=204) if left is None else left

    @app.get(
        "/v1/jobs/{id}/events", response_class=StreamingResponse, operation_id="job_events",
        responses={
            **_problems(404, 409, 422),
            200: {
                "description": "`progress` events and a last `end`; their data is the job",
                "content": {EVENTS_TYPE: {"schema": _EVENT}},
            },
        },
    )  # fmt: skip
    async def events(caller: Reader, id: JobId) -> StreamingResponse:
        """Server-sent events of a job's progress, until it ends."""
        now = await desk.job(caller, id)
        return StreamingResponse(
            job_events(desk, caller, now), media_type=EVENTS_TYPE, headers={"Cache-Control": "no-store"}
        )

    @app.post(
        "/v1/generate", response_class=Response, operation_id="generate",
        responses={
            **_problems(422, 429, 500, 507),
            200: _binary("The network, a .safetensors file", MODEL_TYPE),
            202: {
                "description": f"Not made within {_GENERATE_SECONDS:.0f} s: the job that goes on",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Job"}}},
            },
        },
    )  # fmt: skip
    async def generate(request: GenerateRequest, caller: Submitter) -> Response:
        """Make one model and answer with its file. It is a job like any other, and stays as one."""
        asked = request.model_dump(exclude={"condition", "description"})
        conditions = None if request.condition is None else [request.condition]
        descriptions = None if request.description is None else [request.description]
        whole = JobRequest(**asked, conditions=conditions, descriptions=descriptions)
        job = await desk.submit(caller, whole, None)
        headers = {"Location": f"/v1/jobs/{job.id}"}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _GENERATE_SECONDS
        while not job.state.is_end and (seconds := deadline - loop.time()) > 0:
            job = await desk.news(caller, job.id, job.version, min(seconds, 10.0))
        if job.state == JobState.failed:
            raise ProblemError(500, job.error or "the job failed")
        if job.state == JobState.cancelled:
            raise ProblemError(500, f"job {job.id} was cancelled")
        if not job.state.is_end:
            return JSONResponse(job.model_dump(mode="json"), 202, headers)
        model = await desk.model(caller, job.id, 0)
        path = store.model(job.id, 0)
        response = await asyncio.to_thread(model_response, path, model, {}, path.name)
        response.headers.update(headers)
        return response


def _add_downloads(app: FastAPI, desk: Desk, store: JobStore) -> None:
    @app.get(
        "/v1/jobs/{id}/models", response_model=ModelPage, responses=_problems(404, 409, 422),
        operation_id="list_models",
    )  # fmt: skip
    async def models(
        caller: Reader,
        id: JobId,
        start: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=_PAGE)] = _PAGE,
    ) -> ModelPage:
        """The finished models of a job, with the SHA-256 of their files."""
        return await desk.models(caller, id, start, limit)

    @app.get(
        "/v1/jobs/{id}/models/{index}", response_class=Response, operation_id="get_model",
        responses={
            **_problems(404, 409, 416, 422),
            200: _binary("The network, a .safetensors file; its ETag is the file's SHA-256", MODEL_TYPE),
            206: _binary("The part that was asked for", MODEL_TYPE),
            304: {"description": "If-None-Match named it"},
        },
    )  # fmt: skip
    async def model(caller: Reader, id: JobId, index: Index, request: Request) -> Response:
        """One finished model; understands Range, If-Range and If-None-Match."""
        found = await desk.model(caller, id, index)
        path = store.model(id, index)
        return await asyncio.to_thread(model_response, path, found, request.headers, f"{id}_{path.name}")

    @app.get(
        "/v1/jobs/{id}/archive", response_class=StreamingResponse, operation_id="get_archive",
        responses={**_problems(404, 409, 422), 200: _binary("A tar stream of the models", TAR_TYPE)},
    )  # fmt: skip
    async def archive(caller: Reader, id: JobId) -> Response:
        """All models of a job that has ended."""
        job = await desk.job(caller, id)
        if not job.state.is_end:
            raise ProblemError(409, f"job {id} has not ended", headers={"Retry-After": "5"})
        found: list[ModelFile] = []
        start: int | None = 0
        while start is not None:
            page = await desk.models(caller, id, start, 10 * _PAGE)
            found += page.models
            start = page.next
        paths = [store.model(id, each.index) for each in found]
        files = [(path, each, f"{id}/{path.name}") for path, each in zip(paths, found, strict=True)]
        return archive_response(files, job.created, f"{id}.tar")


def _add_generators(app: FastAPI, desk: Desk) -> None:
    @app.get(
        "/v1/generators", response_model=GeneratorList, responses=_problems(), operation_id="list_generators"
    )
    async def generators(caller: Reader) -> GeneratorList:
        """The generators that are served."""
        # The type of the list's items leaves out their cards and layouts.
        return GeneratorList(generators=list(await desk.generators()))

    @app.get(
        "/v1/generators/{name}", response_model=GeneratorDetail, responses=_problems(404, 422),
        operation_id="get_generator",
    )  # fmt: skip
    async def generator(caller: Reader, name: str) -> GeneratorDetail:
        """One generator: model card, layout, what it asks for, sizes, speed."""
        for each in await desk.generators():
            if each.name == name:
                return each
        raise ProblemError(404, f"no generator '{name}'")

    @app.get(
        "/v1/generators/{name}/centre", response_model=Centre, responses=_problems(404, 422),
        operation_id="get_centre",
    )  # fmt: skip
    async def centre(caller: Reader, name: str) -> Centre:
        """A sample of the mean training checkpoint, to compare a network with."""
        return await desk.centre(name)


def _add_health(app: FastAPI, desk: Desk, metrics: Callable[[], Awaitable[str]]) -> None:
    @app.get("/healthz", response_model=Health, responses=_problems(), operation_id="health")
    async def health() -> Health:
        """Whether jobs are taken. Needs no token."""
        await desk.ping()
        return Health(status="ok")

    @app.get(
        "/metrics", response_class=Response, operation_id="metrics",
        responses={
            **_problems(),
            200: {
                "description": "Prometheus's text format",
                "content": {"text/plain": {"schema": {"type": "string"}}},
            },
        },
    )  # fmt: skip
    async def figures(caller: Admin) -> Response:
        """Figures for Prometheus, as Ray exports them."""
        return Response(await metrics(), media_type=METRICS_TYPE)


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(ProblemError)
    async def problem(request: Request, error: ProblemError) -> Response:
        return problem_response(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return problem_response(
                ProblemError(422, f"the body is not JSON: wrong at character {first['loc'][1]}")
            )
        place = ".".join(str(part) for part in first["loc"][1:]) or first["loc"][0]
        return problem_response(ProblemError(422, f"{place}: {first['msg']}"))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return problem_response(ProblemError(error.status_code, str(error.detail), error.headers))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        _log.error("%s %s", request.method, request.url.path, exc_info=error)
        return problem_response(ProblemError(500, "an error of the service; its log has more"))


def _make_document_exact(app: FastAPI, config: ServeConfig) -> None:
    make = app.openapi

    def openapi() -> dict[str, Any]:
        document = make()
        document["components"]["schemas"].setdefault("Problem", Problem.model_json_schema())
        if not config.auth:
            document["components"].pop("securitySchemes", None)
            for operations in document["paths"].values():
                for operation in operations.values():
                    operation.pop("security", None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
