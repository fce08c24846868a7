"""The service's HTTP application on a real port, without Ray, with faults between it and the network."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from rpg.client import AsyncClient, Client, Patience
from serve.config import GeneratorEntry, ServeConfig
from tests.serve.conftest import (
    TOKENS,
    Service,
    expected,
    generator,
    in_process,
    saved,
    token_entry,
)

__all__ = ["expected", "generator", "in_process", "saved"]

TOKEN = "secret-of-alice"
HURRY = Patience(first=0.02, largest=0.1, total=5.0)
POLL_SECONDS = 0.02


@dataclass
class Request:
    """One that arrived."""

    method: str
    path: str
    headers: Headers
    sent: int = 0
    """Bytes of the answer's body that went out."""


Fault = Callable[[Request, Scope, Receive, Send, Callable[..., Awaitable[None]]], Awaitable[None]]


@dataclass
class Live:
    """The service, what was asked of it, and what is to go wrong: the first matching fault, once."""

    url: str
    requests: list[Request] = field(default_factory=list)
    faults: list[tuple[str, str, Fault]] = field(default_factory=list)
    service: Service | None = None

    def asked(self, method: str, end: str) -> list[Request]:
        """The requests whose path ends so."""
        return [each for each in self.requests if each.method == method and each.path.endswith(end)]

    def fault(self, method: str, end: str, fault: Fault) -> None:
        """Let the next such request meet `fault`."""
        self.faults.append((method, end, fault))

    @property
    def app(self) -> FastAPI:
        assert self.service is not None
        return self.service.app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope["method"], scope["path"], Headers(scope=scope))
        self.requests.append(request)

        async def counted(message: Message) -> None:
            request.sent += len(message.get("body", b""))
            await send(message)

        for entry in self.faults:
            if request.method == entry[0] and request.path.endswith(entry[1]):
                self.faults.remove(entry)
                await entry[2](request, scope, receive, counted, self.app)
                return
        await self.app(scope, receive, counted)


class ConnectionLostError(Exception):
    """Makes the server drop the connection once an answer has begun."""


def cut_after(count: int) -> Fault:
    """The connection is lost after `count` bytes of the body."""

    async def fault(request: Request, scope: Scope, receive: Receive, send: Send, app: Any) -> None:
        left = count

        async def cut(message: Message) -> None:
            nonlocal left
            body = message.get("body", b"")[:left]
            if message["type"] == "http.response.body":
                await send({**message, "body": body, "more_body": True})
                left -= len(body)
                if left == 0:
                    raise ConnectionLostError
            else:
                await send(message)

        with suppress(ConnectionLostError):
            await app(scope, receive, cut)

    return fault


def damaged() -> Fault:
    """One bit of the body changes."""

    async def fault(request: Request, scope: Scope, receive: Receive, send: Send, app: Any) -> None:
        async def flip(message: Message) -> None:
            body = message.get("body", b"")
            if body:
                message = {**message, "body": body[:-1] + bytes([body[-1] ^ 1])}
            await send(message)

        await app(scope, receive, flip)

    return fault


def answered(status: int, headers: dict[str, str], body: bytes = b"") -> Fault:
    """Something else answers."""

    async def fault(request: Request, scope: Scope, receive: Receive, send: Send, app: Any) -> None:
        sent = [(key.lower().encode(), value.encode()) for key, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": sent})
        await send({"type": "http.response.body", "body": body})

    return fault


@pytest.fixture(scope="package")
def served(
    saved: Path, in_process: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Live]:
    config = ServeConfig(
        storage=str(tmp_path_factory.mktemp("service") / "storage"),
        roots=[str(saved.parent)],
        generators=[GeneratorEntry("small", str(saved), num_gpus=0)],
        tokens=[token_entry(name) for name in TOKENS],
    )
    listener = socket.create_server(("127.0.0.1", 0))
    live = Live(f"http://127.0.0.1:{listener.getsockname()[1]}")
    server = uvicorn.Server(uvicorn.Config(live, log_level="critical", lifespan="off", access_log=False))

    async def run() -> None:
        async with in_process(config) as live.service:
            await server.serve([listener])

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.05)
        yield live
    finally:
        server.should_exit = True
        thread.join(60)


@pytest.fixture
def live(served: Live) -> Live:
    served.requests.clear()
    served.faults.clear()
    return served


@pytest.fixture
def client(live: Live) -> Iterator[Client]:
    with Client(live.url, TOKEN, HURRY, poll_seconds=POLL_SECONDS) as client:
        yield client


class Both:
    """Calls both clients in turn, and expects them to tell the same."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __call__(self, method: str, *arguments: Any, **settings: Any) -> Sequence[Any]:
        """What the blocking one says, then the other."""
        with Client(self._url, TOKEN, HURRY, poll_seconds=POLL_SECONDS) as client:
            first = getattr(client, method)(*arguments, **settings)

        async def call() -> Any:
            async with AsyncClient(self._url, TOKEN, HURRY, poll_seconds=POLL_SECONDS) as other:
                return await getattr(other, method)(*arguments, **settings)

        return first, asyncio.run(call())


@pytest.fixture
def both(live: Live) -> Both:
    return Both(live.url)
