"""A few threads that do things while their caller goes on, those of one lane in order.

One file is best written by one thread, since a file system lets one in at a time; several files by several.
"""

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType


class Lanes:
    """A context manager. After a failure nothing more is done in any lane, and the failure is raised where
    more is asked for, or where the block ends."""

    def __init__(self, lanes: int, waiting: int) -> None:
        """At most `waiting` groups of actions are kept waiting; whoever asks for more waits."""
        self._waiting = waiting
        self._lanes = [ThreadPoolExecutor(1, thread_name_prefix=f"lane{lane}") for lane in range(lanes)]
        self._groups: deque[list[Future[None]]] = deque()
        self._failed = False

    def __enter__(self) -> "Lanes":
        return self

    def do(self, actions: Iterable[tuple[int, Callable[[], None]]]) -> None:
        """Do a group of actions, each in the lane of its number, behind all that was asked of it before."""
        self._groups.append(
            [
                self._lanes[number % len(self._lanes)].submit(self._unless_failed, act)
                for number, act in actions
            ]
        )
        while self._groups and (
            len(self._groups) > self._waiting or all(future.done() for future in self._groups[0])
        ):
            self._finish(self._groups[0])
            self._groups.popleft()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._end(cancel=kind is not None)
        except BaseException:
            # Interrupted while it waited: no lane may be left at work.
            self._failed = True
            self._end(cancel=True)
            raise
        if kind is None:
            for group in self._groups:
                self._finish(group)

    def _end(self, cancel: bool) -> None:
        for lane in self._lanes:
            lane.shutdown(wait=False, cancel_futures=cancel)
        # Not for the threads: where that is interrupted, Python takes them for ended (bpo-45274).
        wait([future for group in self._groups for future in group if not future.cancelled()])

    @staticmethod
    def _finish(group: list[Future[None]]) -> None:
        wait(group)
        for future in group:
            future.result()

    def _unless_failed(self, action: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            action()
        except BaseException:
            self._failed = True
            raise
