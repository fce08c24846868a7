"""Events of jobs: one watcher a job, one message for all listeners, and a limit on how many listen."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, cast

import pytest

from rpg.client.schema import Job, JobState
from serve.config import ServeConfig
from serve.dispatch.api import DispatcherAPI
from serve.errors import ProblemError
from serve.http import events
from serve.http.events import JobEvents
from tests.serve.conftest import CONDITIONS, bearer, caller

InProcess = Callable[..., Any]


class Changing:
    """Stands for the dispatcher: a job that changes when it is told to, and counts who asks."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.asked = 0
        self.problems: list[ProblemError] = []
        self._changed = asyncio.Event()

    def change(self, **changes: Any) -> None:
        self.job = self.job.model_copy(update={"version": self.job.version + 1, **changes})
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_for_change(self, caller: Any, job_id: str, version: int, *, seconds: float) -> Job:
        self.asked += 1
        if self.problems:
            raise self.problems.pop()
        if self.job.version == version:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), seconds)
        return self.job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    values = {name: None for name in Job.model_fields} | {
        "id": "a" * 22, "owner": "alice", "generator": "small", "state": "running", "priority": 0, "seed": 0,
        "sampling": {}, "evaluate": False, "models": 9, "number": 9, "finished": 0, "bytes": 0,
        "created": 1.0, "version": 1,
    }  # fmt: skip
    return Job.from_json(values)


def told(text: str) -> tuple[str, int]:
    fields = dict(line.split(": ", 1) for line in text.splitlines() if line)
    return fields["event"], json.loads(fields["data"])["finished"]


async def all_of(stream: AsyncIterator[str]) -> list[str]:
    return [each async for each in stream]


def of(api: Changing, most: int = 1000) -> JobEvents:
    return JobEvents(cast(DispatcherAPI, api), most)


def test_one_change_is_asked_for_once_and_reaches_every_listener(job: Job) -> None:
    async def run() -> None:
        api = Changing(job)
        feed = of(api)
        listening = [asyncio.create_task(all_of(feed.of(caller(), job))) for _ in range(60)]
        await asyncio.sleep(0.05)
        api.change(finished=4)
        await asyncio.sleep(1.0)
        api.change(finished=9, state=JobState.succeeded)
        found = await asyncio.gather(*listening)
        assert api.asked == 2
        assert {tuple(map(told, each)) for each in found} == {
            (("progress", 0), ("progress", 4), ("end", 9)),
        }
        await asyncio.sleep(0)
        assert not feed._watchers and not feed._listeners

    asyncio.run(run())


def test_many_listeners_are_told_at_a_steady_rate_and_only_the_newest(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        monkeypatch.setattr(events, "_MESSAGES_PER_SECOND", 200.0)
        api = Changing(job)
        feed = of(api)
        listening = [asyncio.create_task(all_of(feed.of(caller(), job))) for _ in range(200)]
        await asyncio.sleep(0.1)
        start = asyncio.get_running_loop().time()
        for finished in range(1, 200):
            api.change(finished=finished)
            await asyncio.sleep(0.005)
        api.change(state=JobState.succeeded)
        found = await asyncio.gather(*listening)
        seconds = asyncio.get_running_loop().time() - start
        messages = sum(len(each) - 1 for each in found)
        assert all(told(each[-1]) == ("end", 199) for each in found)
        heard = [[told(each)[1] for each in one] for one in found]
        assert all(one == sorted(one) for one in heard), "never an older state after a newer one"
        assert messages <= 200 * seconds + events._BURST + 1
        assert messages < 200 * 5, "most of the 200 changes were passed over"

    asyncio.run(run())


def test_one_who_comes_later_hears_what_it_missed(job: Job) -> None:
    async def run() -> None:
        api = Changing(job)
        feed = of(api)
        first = asyncio.create_task(all_of(feed.of(caller(), job)))
        await asyncio.sleep(0.05)
        api.change(finished=3)
        await asyncio.sleep(0.05)
        stream = feed.of(caller(), job)
        assert [told(await anext(stream)) for _ in range(2)] == [("progress", 0), ("progress", 3)]
        await stream.aclose()  # type: ignore[attr-defined]
        api.change(state=JobState.failed)
        assert told((await first)[-1]) == ("end", 3)

    asyncio.run(run())


def test_a_dispatcher_that_starts_again_ends_nothing_and_a_removed_job_ends_its_events(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_RETRY_SECONDS", 0.01)

    async def run() -> None:
        api = Changing(job)
        api.problems = [ProblemError(503, "starting")] * 3
        feed = of(api)
        listening = asyncio.create_task(all_of(feed.of(caller(), job)))
        await asyncio.sleep(0.2)
        api.problems = [ProblemError(404, "gone")]
        api.change(finished=1)
        found = await listening
        assert not any("event: end" in each for each in found)

    asyncio.run(run())


def test_more_listeners_than_there_is_room_for_are_told_when_to_come_back(
    config: ServeConfig, in_process: InProcess
) -> None:
    config.limits.listeners = 2

    async def run() -> None:
        async with in_process(config) as service:
            asked = {"generator": "small", "conditions": CONDITIONS, "number": 2000, "steps": 50}
            submitted = await service.client.post("/v1/jobs", json=asked, headers=bearer("alice"))
            path = f"/v1/jobs/{submitted.json()['id']}/events"
            following = [
                asyncio.create_task(service.client.get(path, headers=bearer("alice"))) for _ in range(2)
            ]
            await asyncio.sleep(0.3)
            answer = await service.client.get(path, headers=bearer("alice"))
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "10")
            assert "limits.listeners" in answer.json()["detail"]
            await service.client.delete(path.removesuffix("/events"), headers=bearer("alice"))
            for each in await asyncio.gather(*following):
                assert each.text.rstrip().rpartition("\n\n")[2].startswith("event: end")
            assert (await service.client.get(path, headers=bearer("alice"))).status_code == 200

    asyncio.run(run())
