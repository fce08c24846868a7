"""The HTTP interface as one FastAPI application: routes, authentication, errors, OpenAPI document, page."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from rpg import __version__
from rpg.errors import RPGError
from serve.config import ServeConfig
from serve.dispatch.api import DispatcherAPI
from serve.dispatch.store import JobStore
from serve.errors import ProblemError
from serve.http.auth import AuthMiddleware, TokenAuth
from serve.http.events import JobEvents
from serve.http.page import add_page
from serve.http.problems import Problem, problem_response
from serve.http.routes import add_generators, add_health, add_jobs, add_models

_log = logging.getLogger("ray.serve")


def http_app(
    api: DispatcherAPI, store: JobStore, config: ServeConfig, metrics: Callable[[], Awaitable[str]]
) -> FastAPI:
    """The application.

    Args:
        api: of the dispatcher, or a proxy of it.
        store: where finished models are read.
        config: of the service.
        metrics: gives Prometheus's text.
    """
    app = FastAPI(
        title="RPG",
        version=__version__,
        description="Generates the weights of neural networks.",
        redoc_url=None,
        docs_url=None,
    )
    app.add_middleware(AuthMiddleware, auth=TokenAuth(config), body_bytes=config.limits.body_bytes)
    _answer_errors_with_problems(app)
    _complete_openapi(app, config)
    add_jobs(app, api, store, JobEvents(api, config.limits.listeners))
    add_models(app, api, store)
    add_generators(app, api)
    add_health(app, api, metrics)
    add_page(app)
    return app


def _answer_errors_with_problems(app: FastAPI) -> None:
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

    @app.exception_handler(RPGError)
    async def storage(request: Request, error: RPGError) -> Response:
        _log.error("%s %s: %s", request.method, request.url.path, error)
        return problem_response(ProblemError(503, str(error), {"Retry-After": "5"}))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        _log.error("%s %s", request.method, request.url.path, exc_info=error)
        return problem_response(ProblemError(500, "an error of the service; its log has more"))


def _complete_openapi(app: FastAPI, config: ServeConfig) -> None:
    """Add to the OpenAPI document what FastAPI does not know: problems, and whether tokens are needed."""
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
