"""Events of jobs: one watcher a job, whose messages are shared by all that listen to it.

What is sent costs the proxy and the front a millisecond or two a message and listener, whatever it says. So
messages go out at a steady rate, and a listener gets the newest state when its turn comes: many listeners
each hear less often, and calls in between do not wait for them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator

from rpg.client.schema import Job
from serve.dispatch.api import DispatcherAPI
from serve.dispatch.caller import Caller
from serve.errors import ProblemError

QUIET_SECONDS = 10.0
"""A line is sent at least so often, so that no proxy in between takes the connection for dead. To very many
listeners it comes later, as all messages do."""
_MESSAGES_PER_SECOND = 100.0
_ROUND_SECONDS = 10.0
"""All who may listen get a message within this time, even if that takes more messages a second."""
_BURST = 4
"""Messages that may go out at once after a while without any."""
_RETRY_SECONDS = 1.0
_STILL_HERE = ": still here\n\n"

_log = logging.getLogger("ray.serve")


class JobEvents:
    """Server-sent events of all jobs that are listened to. Methods are called from one event loop."""

    def __init__(self, api: DispatcherAPI, most_listeners: int) -> None:
        """Nobody listens yet, and no more than `most_listeners` may at once."""
        self._api = api
        self._most_listeners = most_listeners
        self._watchers: dict[str, _Watcher] = {}
        self._listeners = 0
        self._pace = _Pace(max(_MESSAGES_PER_SECOND, most_listeners / _ROUND_SECONDS))

    def check_room(self) -> None:
        """Check that one more may listen.

        Raises:
            ProblemError: 429 if too many do.
        """
        if self._listeners >= self._most_listeners:
            raise ProblemError(
                429,
                f"{self._listeners} connections follow events (limits.listeners); ask now and then instead",
                headers={"Retry-After": str(int(QUIET_SECONDS))},
            )

    async def of(self, caller: Caller, job: Job) -> AsyncIterator[str]:
        """`progress` events with the job as JSON, beginning with `job`; the last one is `end`.

        They stop without an `end` if the job is removed.
        """
        self._listeners += 1
        try:
            yield _message(job)
            if job.state.is_end:
                return
            watcher = self._watchers.get(job.id)
            if watcher is None:
                watcher = self._watchers[job.id] = _Watcher(self._api, caller, job, self._pace)
                watcher.task.add_done_callback(lambda _: self._watchers.pop(job.id, None))
            async for message in watcher.listen(job.version):
                yield message
        finally:
            self._listeners -= 1


class _Pace:
    """So many messages a second, of all jobs together."""

    def __init__(self, per_second: float) -> None:
        self._seconds = 1 / per_second
        self._next = 0.0

    async def turn(self) -> None:
        """Wait until another message may go out."""
        now = asyncio.get_running_loop().time()
        self._next = max(self._next + self._seconds, now - _BURST * self._seconds)
        if self._next > now:
            await asyncio.sleep(self._next - now)


class _Listener:
    """What one connection is to send next: the newest message alone."""

    def __init__(self) -> None:
        self.message: str | None = None
        self.has_message = asyncio.Event()

    def offer(self, message: str | None) -> None:
        self.message = message
        self.has_message.set()


class _Watcher:
    """Asks for the changes of one job, and hands each to all its listeners in turn."""

    def __init__(self, api: DispatcherAPI, caller: Caller, job: Job, pace: _Pace) -> None:
        self._api = api
        self._pace = pace
        # Whoever may see a job sees the same of it, so one caller asks for all.
        self._caller = caller
        self._job = job
        self._listeners: dict[_Listener, None] = {}
        self.task = asyncio.create_task(self._watch())

    async def listen(self, version: int) -> AsyncIterator[str]:
        """The messages after a version of the job, to its end."""
        listener = _Listener()
        if self._job.version != version:
            listener.offer(_message(self._job))
        if self.task.done():
            listener.offer(None)
        self._listeners[listener] = None
        try:
            while True:
                await listener.has_message.wait()
                listener.has_message.clear()
                if listener.message is None:
                    if self._job.state.is_end:
                        yield _message(self._job)
                    return
                yield listener.message
        finally:
            del self._listeners[listener]
            if not self._listeners:
                self.task.cancel()

    async def _watch(self) -> None:
        try:
            while not self._job.state.is_end:
                message = _STILL_HERE
                seen = self._job.version
                try:
                    self._job = await self._api.wait_for_change(
                        self._caller, self._job.id, seen, seconds=QUIET_SECONDS
                    )
                except ProblemError as problem:
                    if problem.status != 503:
                        # The job was removed.
                        return
                    # The dispatcher is starting again.
                    await asyncio.sleep(_RETRY_SECONDS)
                if self._job.version != seen:
                    message = _message(self._job)
                if not self._job.state.is_end:
                    await self._tell(message)
        except Exception:
            _log.exception("job %s: its events end", self._job.id)
        finally:
            await self._tell(None)

    async def _tell(self, message: str | None) -> None:
        """Hand a message to all, one after the other; None: there are no more."""
        for listener in list(self._listeners):
            await self._pace.turn()
            listener.offer(message)


def _message(job: Job) -> str:
    name = "end" if job.state.is_end else "progress"
    return f"event: {name}\nid: {job.version}\ndata: {job.model_dump_json()}\n\n"
