"""The error that the service answers a call with."""

from collections.abc import Mapping


class ProblemError(Exception):
    """What a call is refused with: an HTTP status, and `detail`, one line for whoever called."""

    def __init__(self, status: int, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, detail, dict(headers or {}))
        self.status = status
        self.detail = " ".join(detail.split())
        self.headers = dict(headers or {})
