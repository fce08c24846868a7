"""The two clients: `AsyncClient` for programs with an event loop, `Client` for all others."""

from collections.abc import Callable, Coroutine
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import httpx

from rpg.client.back_off import Patience
from rpg.client.calls import POLL_SECONDS, Calls, checked_server, common_headers
from rpg.client.transport import TIMEOUT, AsyncTransport, BlockingTransport, finished

P = ParamSpec("P")
T = TypeVar("T")


class AsyncClient(Calls):
    """Calls a service; `async with AsyncClient(server, token) as client`.

    Args:
        server: its address.
        token: sent with every call; None: none is.
        patience: how calls that fail for now are tried again.
        poll_seconds: pause between questions for a job's progress, where its events do not come through.

    Raises:
        RPGError: if `server` is no address, or `token` is none.
    """

    def __init__(
        self,
        server: str,
        token: str | None = None,
        patience: Patience | None = None,
        *,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        address, headers = checked_server(server), common_headers(token)
        self._client = httpx.AsyncClient(headers=headers, timeout=TIMEOUT)
        super().__init__(address, AsyncTransport(self._client), patience or Patience(), poll_seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()


def _blocking(
    call: Callable[Concatenate[Calls, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    """The method of `Client` that waits for a call's result, with the call's signature and docstring."""

    @wraps(call)
    def method(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return finished(call(client._calls, *args, **kwargs))

    return method


class Client:
    """Calls a service; `with Client(server, token) as client`. Threads may share one.

    Arguments, methods and errors are those of `AsyncClient`; the methods block the thread.

    Raises:
        RPGError: if `server` is no address, or `token` is none.
    """

    def __init__(
        self,
        server: str,
        token: str | None = None,
        patience: Patience | None = None,
        *,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        address, headers = checked_server(server), common_headers(token)
        self._client = httpx.Client(headers=headers, timeout=TIMEOUT)
        transport = BlockingTransport(self._client)
        self._calls = Calls(address, transport, patience or Patience(), poll_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    generators = _blocking(Calls.generators)
    submit = _blocking(Calls.submit)
    job = _blocking(Calls.job)
    jobs = _blocking(Calls.jobs)
    wait = _blocking(Calls.wait)
    cancel = _blocking(Calls.cancel)
    download = _blocking(Calls.download)
    generate = _blocking(Calls.generate)
    understand = _blocking(Calls.understand)
