"""A call is answered in bounded time even if the front is not there, and what has begun is not cut off."""

import asyncio
import time
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from serve.http.front_deadline import FrontDeadline


def client(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(FrontDeadline(app, seconds=0.2))
    return httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")


async def hanging(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body", False):
        continue
    await asyncio.Event().wait()


async def streaming(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(5):
        await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": b"part", "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    raise ValueError("a bug")


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_front_that_hangs_is_answered_for(method: str) -> None:
    async def run() -> None:
        async with client(hanging) as http:
            start = time.monotonic()
            answer = await http.request(method, "/v1/jobs", content=b"{}" if method == "POST" else None)
            assert 0.15 < time.monotonic() - start < 5
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.headers["content-type"] == "application/problem+json"

    asyncio.run(run())


def test_what_has_begun_goes_on() -> None:
    async def run() -> None:
        async with client(streaming) as http:
            answer = await http.get("/v1/jobs/x/events")
            assert (answer.status_code, answer.content) == (200, b"part" * 5)

    asyncio.run(run())


def test_the_time_counts_from_the_end_of_the_request() -> None:
    async def body() -> Any:
        for _ in range(5):
            await asyncio.sleep(0.1)
            yield b"part"

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        found = b""
        while True:
            message = await receive()
            found += message.get("body", b"")
            if not message.get("more_body", False):
                break
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": found})

    async def run() -> None:
        async with client(echo) as http:
            answer = await http.post("/v1/jobs", content=body())
            assert (answer.status_code, answer.content) == (200, b"part" * 5)

    asyncio.run(run())


def test_an_error_stays_one() -> None:
    async def run() -> None:
        async with client(failing) as http:
            with pytest.raises(ValueError, match="a bug"):
                await http.get("/")

    asyncio.run(run())
