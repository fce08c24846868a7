"""Errors as RFC 9457 problem documents: the answers, and what OpenAPI says of them."""

from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from serve.errors import ProblemError

_MEDIA_TYPE = "application/problem+json"
_ANY_CALL = (400, 401, 403, 413, 422, 503)
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


class Problem(BaseModel):
    """An error: what kind it is (`title`, `status`) and what is wrong (`detail`)."""

    model_config = ConfigDict(extra="forbid")

    type: str
    title: str
    status: int
    detail: str


def problem_response(error: ProblemError) -> JSONResponse:
    """The answer that tells an error."""
    problem = Problem(
        type="about:blank",
        title=HTTPStatus(error.status).phrase,
        status=error.status,
        detail=error.detail,
    )
    return JSONResponse(problem.model_dump(), error.status, error.headers, _MEDIA_TYPE)


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For OpenAPI: the problems of a call with these `statuses`, and those that any call may end in."""
    content = {_MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {
        status: {"description": _MEANINGS.get(status, "Bad request"), "content": content}
        for status in (*_ANY_CALL, *statuses)
    }
