"""A bound on how long a call waits for the front, kept by Ray Serve's proxy, which runs in other processes.

A front that is stopped or hangs answers nothing. Ray Serve notices after a minute or two; until then the
proxy answers in its place. Ray Serve's own time limit would end downloads and events as well.

Ray Serve is told by the environment of its processes, which `PROXY_ENVIRONMENT` has.
"""

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ProblemError
from serve.http.problems import problem_response

ANSWER_SECONDS = 30.0
"""How long the front waits for the dispatcher."""
GENERATE_SECONDS = 60.0
"""How long `/v1/generate` waits for its model before it answers with the job."""
GENERATE_PATH = "/v1/generate"
_ON_TOP = 5.0
_ARRIVAL_SECONDS = 60.0
"""How long a request may take to arrive before the front's time begins all the same."""

PROXY_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares",
    # uvicorn would let any caller of this machine name another address in X-Forwarded-For.
    "FORWARDED_ALLOW_IPS": "",
}


def middlewares() -> list[Middleware]:
    """What Ray Serve's proxy puts around every application."""
    return [Middleware(FrontDeadline)]


class FrontDeadline:
    """ASGI middleware: 503 where no answer begins in time after a request has arrived as a whole."""

    def __init__(self, app: ASGIApp, seconds: float = ANSWER_SECONDS + _ON_TOP) -> None:
        self._app = app
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer it if nobody else does."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        arrived, begun = asyncio.Event(), asyncio.Event()
        headers = Headers(scope=scope)
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            arrived.set()

        async def receiving() -> Message:
            message = await receive()
            if not message.get("more_body", False):
                arrived.set()
            return message

        async def sending(message: Message) -> None:
            begun.set()
            await send(message)

        seconds = self._seconds + (GENERATE_SECONDS if scope["path"] == GENERATE_PATH else 0.0)
        answer = asyncio.ensure_future(self._app(scope, receiving, sending))
        watch = asyncio.ensure_future(self._is_late(arrived, begun, seconds))
        try:
            await asyncio.wait((answer, watch), return_when=asyncio.FIRST_COMPLETED)
            if answer.done() or begun.is_set():
                await answer
                return
            answer.cancel()
            # The application must not send after this has.
            with suppress(asyncio.CancelledError, Exception):
                await answer
            if not begun.is_set():
                why = "the service does not answer now; try once more"
                problem = ProblemError(503, why, {"Retry-After": "5"})
                await problem_response(problem)(scope, receive, send)
        finally:
            watch.cancel()
            answer.cancel()

    async def _is_late(self, arrived: asyncio.Event, begun: asyncio.Event, seconds: float) -> None:
        """Return when an answer has begun, or so many seconds after the request has arrived."""
        with suppress(TimeoutError):
            await asyncio.wait_for(arrived.wait(), _ARRIVAL_SECONDS)
        with suppress(TimeoutError):
            await asyncio.wait_for(begun.wait(), seconds)
