"""Progress of a job as server-sent events."""

from collections.abc import AsyncIterator

from rpg.client.schema import Job
from serve.dispatch.api import Desk
from serve.http.auth import Caller
from serve.http.problems import ProblemError

EVENTS_TYPE = "text/event-stream"

_QUIET_SECONDS = 10.0
"""A line is sent at least so often, so that whoever lies between does not take the connection for dead."""


async def job_events(desk: Desk, caller: Caller, job: Job) -> AsyncIterator[str]:
    """`progress` events with the job as JSON, beginning with `job`; the last one is `end`."""
    while True:
        name = "end" if job.state.is_end else "progress"
        yield f"event: {name}\nid: {job.version}\ndata: {job.model_dump_json()}\n\n"
        if name == "end":
            return
        seen = job.version
        while job.version == seen:
            try:
                job = await desk.news(caller, job.id, seen, _QUIET_SECONDS)
            except ProblemError as problem:
                if problem.status != 503:
                    # Removed, or moved out of sight.
                    return
            if job.version == seen:
                yield ": still here\n\n"
