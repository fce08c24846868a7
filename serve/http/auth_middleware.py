"""What happens to a request before any route sees it: who calls, and how much they send."""

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.http.auth import Gate
from serve.http.page import PAGE_PATHS
from serve.http.problems import MEDIA_TYPE, Problem, ProblemError

OPEN_PATHS = ("/healthz", "/openapi.json", *PAGE_PATHS)
"""What is answered without a token. Nothing about jobs is told there."""


class Gatekeeper:
    """ASGI middleware: puts the `Caller` into the request's state, and refuses bodies that are too large."""

    def __init__(self, app: ASGIApp, gate: Gate, body_bytes: int) -> None:
        self._app = app
        self._gate = gate
        self._body_bytes = body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            if scope["path"] not in OPEN_PATHS:
                client = scope["client"][0] if scope.get("client") else None
                caller = self._gate.caller(headers.get("authorization"), client, headers.get("host"))
                scope.setdefault("state", {})["caller"] = caller
            body = await self._body(headers, receive)
        except ProblemError as problem:
            await problem_response(problem)(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _replayed(body, receive), send)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """All of it, which is little; None if the caller is gone before its end."""
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._body_bytes:
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


def problem_response(problem: ProblemError) -> JSONResponse:
    """The answer that tells a problem."""
    document = Problem.of(problem.status, problem.detail).model_dump()
    return JSONResponse(document, problem.status, problem.headers, MEDIA_TYPE)


def _replayed(body: bytes, receive: Receive) -> Receive:
    told = False

    async def replay() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
