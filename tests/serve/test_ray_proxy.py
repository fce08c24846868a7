"""Calls through a handle of Ray Serve, with a fake of the handle."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from serve.errors import ProblemError
from serve.ray_proxy import RayProxy


class FakeHandle:
    """A deployment whose methods all do `answer(method, arguments, options)`."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self.answer = answer

    def options(self, method_name: str, stream: bool = False) -> Any:
        class Method:
            @staticmethod
            def remote(*arguments: Any, **options: Any) -> Any:
                return self.answer(method_name, arguments, options)

        return Method


class FakeStream:
    """The numbers from 0, and whether they were cancelled."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.cancelled = False

    async def __aiter__(self) -> AsyncIterator[int]:
        for number in range(self.count):
            yield number

    def cancel(self) -> None:
        self.cancelled = True


def proxy(answer: Callable[..., Any], **options: Any) -> Any:
    return RayProxy(FakeHandle(answer), **options)  # type: ignore[arg-type]


async def echo(*call: Any) -> Any:
    return call


def raises(error: Exception) -> Callable[..., Any]:
    async def fail(*call: Any) -> None:
        raise error

    return fail


def test_every_method_is_forwarded_with_its_arguments() -> None:
    answer = asyncio.run(proxy(echo).submit(1, "a", seconds=2.0))
    assert answer == ("submit", (1, "a"), {"seconds": 2.0})
    assert not hasattr(proxy(echo), "_submit")


def test_an_error_of_the_other_side_that_is_a_problem_is_that_problem() -> None:
    problem = ProblemError(404, "no job 'x'")
    failing = proxy(raises(RayTaskError("job", "a traceback", problem)), timeout_seconds=5.0)
    with pytest.raises(ProblemError, match="no job 'x'") as caught:
        asyncio.run(failing.job("x"))
    assert caught.value is problem
    with pytest.raises(RayTaskError):
        asyncio.run(proxy(raises(RayTaskError("job", "", ValueError("x"))), timeout_seconds=5.0).job("x"))


def test_a_side_that_is_lost_or_silent_is_a_503_where_somebody_waits() -> None:
    async def silent(*call: Any) -> None:
        await asyncio.sleep(60)

    for answer in (raises(RayActorError()), silent):
        with pytest.raises(ProblemError, match="the service is starting again; try once more") as caught:
            asyncio.run(proxy(answer, timeout_seconds=0.05).ping())
        assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})
    with pytest.raises(RayActorError):
        asyncio.run(proxy(raises(RayActorError())).ping())


def test_a_call_that_waits_itself_has_so_much_more_time() -> None:
    async def slow(*call: Any) -> str:
        await asyncio.sleep(0.3)
        return "changed"

    assert asyncio.run(proxy(slow, timeout_seconds=0.05).wait_for_change("x", seconds=20.0)) == "changed"


def test_a_stream_that_is_closed_early_is_cancelled() -> None:
    async def take(count: int, stream: FakeStream) -> list[int]:
        taken: list[int] = []
        async with aclosing(proxy(lambda *call: stream, streamed=["make"]).make("lease")) as numbers:
            async for number in numbers:
                taken.append(number)
                if len(taken) == count:
                    break
        return taken

    whole, part = FakeStream(3), FakeStream(3)
    assert asyncio.run(take(4, whole)) == [0, 1, 2]
    assert asyncio.run(take(2, part)) == [0, 1]
    assert (whole.cancelled, part.cancelled) == (False, True)
