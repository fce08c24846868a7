"""One thread that does things in order while its caller goes on."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class InBackground:
    """A context manager. After a failure nothing more is done, and the failure is raised where the next thing
    is asked for, or where the block ends."""

    def __init__(self, waiting: int) -> None:
        """At most `waiting` things are kept waiting; whoever asks for more waits."""
        self._waiting = waiting
        self._pool = ThreadPoolExecutor(1)
        self._futures: deque[Future[None]] = deque()
        self._failed = False

    def __enter__(self) -> "InBackground":
        return self

    def do(self, action: Callable[[], None]) -> None:
        """Do `action` after all that was asked for before."""
        self._futures.append(self._pool.submit(self._unless_failed, action))
        while self._futures and (self._futures[0].done() or len(self._futures) > self._waiting):
            self._futures.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            for future in self._futures:
                future.result()

    def _unless_failed(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except BaseException:
            self._failed = True
            raise
