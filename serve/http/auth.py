"""Who calls, and what they may do: bearer tokens with scopes, read before any route sees a request."""

import hashlib
import hmac
import re
from datetime import UTC, datetime

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.config import LOOPBACK, SCOPES, ServeConfig, expiry
from serve.dispatch.caller import Caller
from serve.errors import ProblemError
from serve.http.page import PAGE_PATHS
from serve.http.problems import problem_response

LOCAL_OWNER = "local"
"""Owner of all jobs where no tokens are asked for."""

_OPEN_PATHS = ("/healthz", "/openapi.json", *PAGE_PATHS)
"""What is answered without a token. Nothing about jobs is told there."""
_LOOPBACK_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
"""The whole of a Host header: a part of one would also be found in the name of another host."""
_CHALLENGE = {"WWW-Authenticate": "Bearer"}


class TokenAuth:
    """Finds the `Caller` that a request's headers stand for."""

    def __init__(self, config: ServeConfig) -> None:
        self._open = not config.auth
        self._tokens = [
            (token.sha256, Caller(token.owner, frozenset(token.scopes)), expiry(token))
            for token in config.tokens
        ]

    def caller(self, authorization: str | None, client: str | None, host: str | None) -> Caller:
        """The caller of a request.

        Args:
            authorization: the header of that name.
            client: the address that the request came from.
            host: the header of that name.

        Raises:
            ProblemError: 401 for a token that is missing, unknown or expired; 403 for a call from another
                machine where no tokens are asked for.
        """
        if self._open:
            # The host is checked as well, because a page elsewhere may have its own name resolve to this
            # machine, and a browser that shows it here would then call for it.
            if client not in LOOPBACK or not _LOOPBACK_HOST.fullmatch(host or ""):
                raise ProblemError(403, "'auth: off' answers calls from this machine to 127.0.0.1 alone")
            return Caller(LOCAL_OWNER, frozenset(SCOPES))
        kind, _, token = (authorization or "").partition(" ")
        if kind.lower() != "bearer" or not token:
            raise ProblemError(401, "expected the header 'Authorization: Bearer TOKEN'", headers=_CHALLENGE)
        return self._known(hashlib.sha256(token.strip().encode()).hexdigest())

    def _known(self, digest: str) -> Caller:
        found = [entry for entry in self._tokens if hmac.compare_digest(entry[0], digest)]
        if not found:
            raise ProblemError(401, "unknown token", headers=_CHALLENGE)
        _, caller, expires = found[0]
        if expires is not None and expires <= datetime.now(UTC):
            raise ProblemError(401, f"this token expired at {expires.isoformat()}", headers=_CHALLENGE)
        return caller


class AuthMiddleware:
    """ASGI middleware: puts the `Caller` into the request's state, and refuses bodies that are too large."""

    def __init__(self, app: ASGIApp, auth: TokenAuth, body_bytes: int) -> None:
        self._app = app
        self._auth = auth
        self._body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"] not in _OPEN_PATHS:
                client = scope["client"][0] if scope.get("client") else None
                caller = self._auth.caller(headers.get("authorization"), client, headers.get("host"))
                scope.setdefault("state", {})["caller"] = caller
            body = await self._body(headers, receive)
        except ProblemError as problem:
            await problem_response(problem)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, which is small; None if the caller is gone before its end."""
        # What is longer than any number of bytes is not even made a number.
        announced = headers.get("content-length", "0").lstrip("0")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._body_bytes):
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._body_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self) -> ProblemError:
        return ProblemError(413, f"expected at most {self._body_bytes} bytes (limits.body_bytes)")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that hands out `body`, which has been read already, and then what comes after it."""
    handed_out = False

    async def replay() -> Message:
        nonlocal handed_out
        if handed_out:
            return await receive()
        handed_out = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
