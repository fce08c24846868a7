"""Calls of an object in another process, by way of a deployment's handle of Ray Serve."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from functools import partial
from typing import Any, cast

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from serve.errors import ProblemError


class RayProxy:
    """Stands for the class that is deployed: every method of that class is a method of the proxy.

    The methods must be coroutines or asynchronous generators. Callers cast the proxy to the class, or to a
    protocol of it.
    """

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        *,
        streamed: Collection[str] = (),
        timeout_seconds: float | None = None,
    ) -> None:
        """Nothing is called yet.

        Args:
            handle: to the deployment.
            streamed: the methods that are asynchronous generators. When their iterator is closed early, the
                call is cancelled.
            timeout_seconds: how long a coroutine's answer is waited for, for the sake of somebody who waits
                too: where none comes in time, or Ray reports that the other process is lost, the call raises
                a `ProblemError` with status 503. A call's own keyword argument `seconds`, how long it may
                wait itself, comes on top. None: wait for ever, and raise whatever Ray raises.
        """
        self._handle = handle
        self._streamed = frozenset(streamed)
        self._timeout_seconds = timeout_seconds

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._iterate if method in self._streamed else self._call, method)

    async def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        response = self._handle.options(method_name=method).remote(*arguments, **options)
        if self._timeout_seconds is None:
            return await response
        try:
            async with asyncio.timeout(self._timeout_seconds + options.get("seconds", 0.0)):
                return await response
        except RayTaskError as error:
            if isinstance(error.cause, ProblemError):
                raise error.cause from None
            raise
        except (RayError, RayServeException, TimeoutError) as error:
            # The call may have been carried out. An Idempotency-Key makes it safe to ask for a job again.
            raise ProblemError(
                503, "the service is starting again; try once more", headers={"Retry-After": "1"}
            ) from error

    async def _iterate(self, method: str, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
        stream = self._handle.options(method_name=method, stream=True)
        response = cast(DeploymentResponseGenerator[Any], stream.remote(*arguments, **options))
        complete = False
        try:
            async for item in response:
                yield item
            complete = True
        finally:
            if not complete:
                response.cancel()  # type: ignore[no-untyped-call]
