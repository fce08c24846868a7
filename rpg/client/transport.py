"""Sending requests and waiting, which the two clients do differently: one blocks a thread, the other a task.

All calls are written once, as coroutines over a `Transport`. The methods of `BlockingTransport` never
suspend, so that `finished` can run a call over it to its end without an event loop, and even within one.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import httpx

T = TypeVar("T")

# A job's events bring a line every 10 s, so that this much silence is a dead connection.
TIMEOUT = httpx.Timeout(30.0, connect=10.0)


class Response(Protocol):
    """An HTTP response whose body is still to be read. All methods may raise an `httpx.TransportError`."""

    status: int
    headers: Mapping[str, str]

    async def block(self) -> bytes:
        """The next part of the body; empty at its end."""
        ...

    async def close(self) -> None:
        """Give the connection back."""
        ...


class Transport(Protocol):
    """Sends requests, and waits."""

    async def send(self, method: str, url: str, **request: Any) -> Response:
        """The response, as soon as its headers are there. May raise an `httpx.TransportError`."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        ...

    async def run_blocking(self, work: Callable[[], T]) -> T:
        """Run `work`, which takes the disk or the processor long, without holding up other tasks."""
        ...


class BlockingTransport:
    """A transport whose methods block the thread."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client

    async def send(self, method: str, url: str, **request: Any) -> Response:
        """Block the thread until the headers are there."""
        return _BlockingResponse(
            self.client.send(self.client.build_request(method, url, **request), stream=True)
        )

    async def sleep(self, seconds: float) -> None:
        """Block the thread."""
        time.sleep(seconds)

    async def run_blocking(self, work: Callable[[], T]) -> T:
        """Run `work` in this thread."""
        return work()


class AsyncTransport:
    """A transport for an event loop."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def send(self, method: str, url: str, **request: Any) -> Response:
        """Let other tasks run until the headers are there."""
        asked = self.client.build_request(method, url, **request)
        return _AsyncResponse(await self.client.send(asked, stream=True))

    async def sleep(self, seconds: float) -> None:
        """Let other tasks run."""
        await asyncio.sleep(seconds)

    async def run_blocking(self, work: Callable[[], T]) -> T:
        """Run `work` in another thread."""
        return await asyncio.to_thread(work)


def finished(call: Coroutine[Any, Any, T]) -> T:
    """The result of a call over a `BlockingTransport`."""
    try:
        call.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("a blocking call was suspended")


# Bodies are read raw, since digests and ranges count the bytes on the wire.


class _BlockingResponse:
    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._blocks: Iterator[bytes] = response.iter_raw()

    async def block(self) -> bytes:
        return next(self._blocks, b"")

    async def close(self) -> None:
        self._response.close()


class _AsyncResponse:
    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.headers: Mapping[str, str] = response.headers
        self._response = response
        self._blocks: AsyncIterator[bytes] = response.aiter_raw()

    async def block(self) -> bytes:
        return await anext(self._blocks, b"")

    async def close(self) -> None:
        await self._response.aclose()


class Event(NamedTuple):
    """A server-sent event: its name and its data."""

    name: str
    data: str


class EventReader:
    """Turns the bytes of a stream, cut anywhere, into events."""

    def __init__(self) -> None:
        self._rest = b""
        self._name = ""
        self._data: list[str] = []

    def feed(self, block: bytes) -> list[Event]:
        """The events that are whole with `block`."""
        *lines, self._rest = (self._rest + block).split(b"\n")
        found = []
        for line in lines:
            text = line.removesuffix(b"\r").decode(errors="replace")
            key, _, value = text.partition(":")
            value = value.removeprefix(" ")
            if not text:
                if self._data:
                    found.append(Event(self._name, "\n".join(self._data)))
                self._name, self._data = "", []
            elif key == "event":
                self._name = value
            elif key == "data":
                self._data.append(value)
        return found
