"""Errors as RFC 9457 problem documents."""

from collections.abc import Mapping
from http import HTTPStatus

from pydantic import BaseModel, ConfigDict

MEDIA_TYPE = "application/problem+json"


class ProblemError(Exception):
    """What a call is refused with; `detail` is one line for whoever called."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.status = status
        self.detail = " ".join(detail.split())
        self.headers = dict(headers or {})


class Problem(BaseModel):
    """An error: what kind it is (`title`, `status`) and what is wrong (`detail`)."""

    model_config = ConfigDict(extra="forbid")

    type: str
    title: str
    status: int
    detail: str

    @classmethod
    def of(cls, status: int, detail: str) -> "Problem":
        """The document for an HTTP status."""
        return cls(type="about:blank", title=HTTPStatus(status).phrase, status=status, detail=detail)
