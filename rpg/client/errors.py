"""The error of a call that was refused or did not reach the service, as one line."""

import email.utils
import json
import time
from collections.abc import Mapping

from rpg.errors import RPGError, one_line

_PROBLEM = "application/problem+json"
_TEMPORARY = (429, 503)
_GATEWAY = (500, 502, 504)


class CallError(RPGError):
    """A call that the service refused, or that did not reach it.

    Attributes:
        status: of the HTTP answer; None where there was none.
        is_temporary: whether the same call may succeed later.
        retry_after: seconds that the service asks to wait, if it does.
    """

    def __init__(
        self, message: str, status: int | None, is_temporary: bool, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.is_temporary = is_temporary
        self.retry_after = retry_after


def refused(call: str, status: int, headers: Mapping[str, str], body: bytes) -> CallError:
    """The error that an HTTP answer tells; `call` says which one it was, for answers that do not say why."""
    detail = _detail(headers, body)
    # While the service's front is started again, the proxy before it answers, without a problem document.
    temporary = status in _TEMPORARY or (status in _GATEWAY and detail is None)
    message = detail or f"{call} was answered with HTTP status {status}"
    return CallError(message, status, temporary, _seconds(headers.get("retry-after")))


def unreachable(server: str, error: Exception) -> CallError:
    """The error of a connection that could not be made, or that broke off."""
    reason = one_line(error)
    # A certificate that is not trusted now will not be trusted in a minute, so that trying again is useless.
    temporary = "CERTIFICATE_VERIFY_FAILED" not in reason
    return CallError(f"{server}: no connection: {reason}", None, temporary)


def _detail(headers: Mapping[str, str], body: bytes) -> str | None:
    if headers.get("content-type", "").partition(";")[0].strip() != _PROBLEM:
        return None
    try:
        document = json.loads(body)
        text = document.get("detail") or document.get("title")
    except (ValueError, AttributeError, RecursionError):
        return None
    return " ".join(str(text).split()) if text else None


def _seconds(header: str | None) -> float | None:
    """The wait that a Retry-After header asks for: it gives seconds, or a date."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
