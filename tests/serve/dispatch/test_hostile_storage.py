"""A storage that lies: links, FIFOs, wrong numbers and cut files in the place of what the service wrote.

Whatever links lead to is a scratch directory of the test.
"""

import asyncio
import json
import os
import resource
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rpg.client.schema import JobState
from rpg.errors import RPGError
from serve.config import ServeConfig
from serve.dispatch.records import JobProgress
from serve.dispatch.store import JobStore
from tests.serve.conftest import CONDITIONS, Service, bearer

InProcess = Callable[..., Any]
ALICE, ADMIN = bearer("alice"), bearer("root")
OFTEN = {"tick_seconds": 0.02, "save_seconds": 0.02}
TARGET = {"kept.txt": b"kept", "below/kept.bin": b"kept too"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A directory outside the storage, which must stay as it is."""
    directory = tmp_path / "outside"
    for name, content in TARGET.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


def content_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


async def ended(service: Service, number: int = 2, **asked: Any) -> str:
    answer = await service.client.post(
        "/v1/jobs",
        json={"generator": "small", "conditions": CONDITIONS[:1], "number": number, **asked},
        headers=ALICE,
    )
    assert answer.status_code == 202, answer.text
    id = str(answer.json()["id"])
    await service.ended(id)
    return id


def run_once(config: ServeConfig, in_process: InProcess, jobs: int = 2) -> list[str]:
    """The ids of jobs that a service has made and written down; it is stopped then."""

    async def run() -> list[str]:
        async with in_process(config) as service:
            return [await ended(service) for _ in range(jobs)]

    return asyncio.run(run())


def job(config: ServeConfig, id: str) -> Path:
    return Path(config.storage) / "jobs" / id


def start_again(
    config: ServeConfig, in_process: InProcess, check: Callable[[Service], Any], **options: Any
) -> None:
    async def run() -> None:
        async with asyncio.timeout(60), in_process(config, **options) as service:
            await check(service)

    asyncio.run(run())


async def quarantined(service: Service) -> dict[str, str]:
    listed = await service.client.get("/v1/jobs", headers=ADMIN)
    assert listed.status_code == 200, listed.text
    return {each["id"]: each["reason"] for each in listed.json()["quarantined"]}


async def is_served(service: Service, id: str) -> bool:
    answer = await service.client.get(f"/v1/jobs/{id}/models/0", headers=ALICE)
    return answer.status_code == 200 and len(answer.content) > 1000


def test_a_link_in_the_place_of_a_job_is_named_and_its_removal_removes_the_link(
    config: ServeConfig, in_process: InProcess, target: Path
) -> None:
    linked, healthy = run_once(config, in_process)
    shutil.rmtree(job(config, linked))
    job(config, linked).symlink_to(target)

    async def check(service: Service) -> None:
        assert list(await quarantined(service)) == [linked]
        assert content_of(target) == TARGET, "the start wrote nothing there"
        assert (await service.client.delete(f"/v1/jobs/{linked}", headers=ALICE)).status_code == 404
        assert (await service.client.delete(f"/v1/jobs/{linked}", headers=ADMIN)).status_code == 204
        assert await is_served(service, healthy)

    start_again(config, in_process, check)
    assert content_of(target) == TARGET
    assert not job(config, linked).is_symlink() and job(config, healthy).is_dir()


def test_links_within_a_job_are_removed_and_not_followed(
    config: ServeConfig, in_process: InProcess, target: Path
) -> None:
    (id,) = run_once(config, in_process, 1)
    (job(config, id) / "a-link").symlink_to(target)
    (job(config, id) / "models" / "another").symlink_to(target)

    async def check(service: Service) -> None:
        assert (await service.client.delete(f"/v1/jobs/{id}", headers=ALICE)).status_code == 204

    start_again(config, in_process, check)
    assert content_of(target) == TARGET
    assert not job(config, id).exists()


def test_a_directory_of_models_that_is_a_link_gets_none(
    config: ServeConfig, in_process: InProcess, target: Path
) -> None:
    """Also where it becomes one while the service runs."""

    async def run() -> None:
        async with in_process(config) as service:
            asked = {"generator": "small", "conditions": CONDITIONS[:1], "number": 400, "steps": 50}
            id = (await service.client.post("/v1/jobs", json=asked, headers=ALICE)).json()["id"]
            while not service.dispatcher._table.get(id).progress.made:
                await asyncio.sleep(0.01)
            models = job(config, id) / "models"
            models.rename(models.with_name("elsewhere"))
            models.symlink_to(target)
            found = await service.ended(id)
            assert found["state"] == "failed"
            assert f"jobs/{id}/models: is a link; expected a directory" in found["error"]
            assert content_of(target) == TARGET
            other = await ended(service)
            assert await is_served(service, other)

    asyncio.run(run())
    assert content_of(target) == TARGET


def test_a_storage_whose_jobs_lie_elsewhere_is_refused(
    config: ServeConfig, in_process: InProcess, target: Path
) -> None:
    Path(config.storage).mkdir()
    (Path(config.storage) / "jobs").symlink_to(target)
    with pytest.raises(RPGError, match=r"/jobs: is a link; expected a directory$"):
        list(JobStore(Path(config.storage)).all())


def test_a_wrong_size_removes_no_job(config: ServeConfig, in_process: InProcess) -> None:
    """The size of all is above the limit if the state of one is believed."""
    liar, *others = run_once(config, in_process, 3)
    path = job(config, liar) / "state.json"
    state = json.loads(path.read_text())
    state["made"][0][2] = 200_000_000_000
    path.write_text(json.dumps(state))

    async def check(service: Service) -> None:
        await asyncio.sleep(0.5)
        reasons = await quarantined(service)
        assert list(reasons) == [liar]
        assert "state.json: model 0: says 200000000000 bytes; model_000000.safetensors has" in reasons[liar]
        assert [await is_served(service, id) for id in others] == [True, True]

    start_again(config, in_process, check, **OFTEN)
    assert all(job(config, id).is_dir() for id in (liar, *others))


@pytest.mark.parametrize("state", [JobState.failed, JobState.cancelled, JobState.succeeded, None])
def test_memory_is_for_what_a_job_holds_and_not_for_a_number(
    config: ServeConfig, in_process: InProcess, state: JobState | None
) -> None:
    """An ended job of 10^9 models, and one that is to be made, which is above the limit."""
    large, healthy = run_once(config, in_process)
    path = job(config, large) / "job.json"
    manifest = json.loads(path.read_text())
    manifest["job"]["number"] = 10**9
    path.write_text(json.dumps(manifest))
    if state is None:
        (job(config, large) / "state.json").unlink()
    else:
        progress = json.loads((job(config, large) / "state.json").read_text())
        (job(config, large) / "state.json").write_text(json.dumps({**progress, "state": state.value}))

    async def check(service: Service) -> None:
        reasons = await quarantined(service)
        if state in (JobState.failed, JobState.cancelled):
            assert not reasons
            listed = (await service.client.get(f"/v1/jobs/{large}", headers=ALICE)).json()
            assert (listed["models"], listed["finished"]) == (10**9, 2)
        elif state is None:
            assert "number: expected at most 10000 models (limits.models_per_job), got 1000000000" in str(
                reasons
            )
        else:
            assert "says that the job succeeded, with 2 of 1000000000 models" in reasons[large]
        assert await is_served(service, healthy)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_again(config, in_process, check)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000, "kilobytes"


@pytest.mark.parametrize("number", [2**63, 10**30])
def test_a_number_beyond_all_lengths_is_no_length(
    config: ServeConfig, in_process: InProcess, number: int
) -> None:
    large, healthy = run_once(config, in_process)
    path = job(config, large) / "job.json"
    path.write_text(path.read_text().replace('"number": 2', f'"number": {number}'))

    async def check(service: Service) -> None:
        assert list(await quarantined(service)) == [large]
        assert await is_served(service, healthy)

    start_again(config, in_process, check)


@pytest.mark.parametrize("has_state", [True, False])
def test_a_link_in_the_place_of_a_model_is_not_served(
    config: ServeConfig, in_process: InProcess, target: Path, has_state: bool
) -> None:
    (id,) = run_once(config, in_process, 1)
    model = job(config, id) / "models" / "model_000001.safetensors"
    whole = model.read_bytes()
    # The best that a link can lead to: the very same content.
    outside = target / "model.safetensors"
    model.rename(outside)
    model.symlink_to(outside)
    if not has_state:
        (job(config, id) / "state.json").unlink()

    async def check(service: Service) -> None:
        if has_state:
            assert "model_000001.safetensors is no regular file" in (await quarantined(service))[id]
            return
        assert (await service.ended(id))["state"] == "succeeded"
        assert not model.is_symlink(), "it was made again"
        got = await service.client.get(f"/v1/jobs/{id}/models/1", headers=ALICE)
        assert got.content == whole

    start_again(config, in_process, check)
    assert outside.read_bytes() == whole


def test_a_model_that_becomes_a_link_while_the_service_runs_is_not_served(
    config: ServeConfig, in_process: InProcess, target: Path
) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            id = await ended(service)
            model = job(config, id) / "models" / "model_000000.safetensors"
            secret = bytes(len(model.read_bytes()))
            (target / "secret").write_bytes(secret)
            model.unlink()
            model.symlink_to(target / "secret")
            answer = await service.client.get(f"/v1/jobs/{id}/models/0", headers=ALICE)
            assert (answer.status_code, "no regular file" in answer.text) == (404, True)
            with pytest.raises(Exception, match=r"."):
                await service.client.get(f"/v1/jobs/{id}/archive", headers=ALICE)
            model.unlink()
            model.write_bytes(b"short")
            answer = await service.client.get(f"/v1/jobs/{id}/models/0", headers=ALICE)
            assert (answer.status_code, "has 5 bytes, and had" in answer.text) == (404, True)
            model.unlink()
            os.mkfifo(model)
            answer = await service.client.get(f"/v1/jobs/{id}/models/0", headers=ALICE)
            assert answer.status_code == 404

    asyncio.run(run())


def cut(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def another(path: Path) -> None:
    path.write_bytes((path.parent / "model_000000.safetensors").read_bytes())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, halve, lengthen, another])
def test_a_model_that_is_not_whole_is_made_again(
    config: ServeConfig, in_process: InProcess, damage: Callable[[Path], None]
) -> None:
    (id,) = run_once(config, in_process, 1)
    model = job(config, id) / "models" / "model_000001.safetensors"
    whole = model.read_bytes()
    damage(model)
    (job(config, id) / "state.json").unlink()

    async def check(service: Service) -> None:
        assert (await service.ended(id))["state"] == "succeeded"
        got = await service.client.get(f"/v1/jobs/{id}/models/1", headers=ALICE)
        assert got.content == whole == model.read_bytes()

    start_again(config, in_process, check)


def test_a_byte_that_was_changed_before_a_job_ended_is_found_by_the_digest(
    config: ServeConfig, in_process: InProcess
) -> None:
    (id,) = run_once(config, in_process, 1)
    model = job(config, id) / "models" / "model_000001.safetensors"
    whole = model.read_bytes()
    flip(model)
    store = JobStore(Path(config.storage))
    progress = store.progress(store.manifest(id))
    store.save(id, JobProgress(JobState.running, progress.digest, made=progress.made))

    async def check(service: Service) -> None:
        assert (await service.ended(id))["state"] == "succeeded"
        assert model.read_bytes() == whole

    start_again(config, in_process, check)


STATES: list[dict[str, Any]] = [
    {"digest": ["0" * 64]}, {"digest": 7}, {"digest": "../.."}, {"state": ["succeeded"]}, {"started": "now"},
    {"ended": float("nan")}, {"ended": 1e300}, {"ended": -1}, {"made": {}}, {"made": [[]]}, {"made": [None]},
    {"error": []}, {"colour": "red"}, {"made": [[0, "0" * 64, -1]]}, {"made": [[0, "x", 1]]}, {"made": []},
]  # fmt: skip


@pytest.mark.parametrize("change", STATES, ids=str)
def test_a_state_that_is_none_quarantines_its_job_alone(
    config: ServeConfig, in_process: InProcess, change: dict[str, Any]
) -> None:
    wrong, healthy = run_once(config, in_process)
    path = job(config, wrong) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    async def check(service: Service) -> None:
        reasons = await quarantined(service)
        assert list(reasons) == [wrong] and "\n" not in reasons[wrong] and "state.json: " in reasons[wrong]
        answer = await service.client.get("/v1/jobs", headers=ALICE)
        assert [each["id"] for each in answer.json()["jobs"]] == [healthy]
        assert (await service.client.get(f"/v1/jobs/{wrong}", headers=ADMIN)).status_code == 409

    start_again(config, in_process, check)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    """What a link to a device would do: it never ends, and takes no room."""
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)


def looped(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def nested(path: Path) -> None:
    path.write_text("[" * 200_000)


@pytest.mark.parametrize("name", ["job.json", "state.json"])
@pytest.mark.parametrize("damage", [fifo, device, looped, directory, nested, cut])
def test_a_record_that_is_no_file_holds_nothing_up(
    config: ServeConfig, in_process: InProcess, name: str, damage: Callable[[Path], None]
) -> None:
    wrong, healthy = run_once(config, in_process)
    damage(job(config, wrong) / name)
    start = time.monotonic()

    async def check(service: Service) -> None:
        reasons = await quarantined(service)
        assert list(reasons) == [wrong] and name in reasons[wrong]
        assert await is_served(service, healthy)
        assert (await service.client.delete(f"/v1/jobs/{wrong}", headers=ADMIN)).status_code == 204

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start_again(config, in_process, check)
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000, "kilobytes"
    assert not job(config, wrong).exists()


FULL_DISK = """
import asyncio, resource, signal, sys, types
from pathlib import Path



import tests.serve.conftest as c
from serve.errors import ProblemError
from serve.dispatch.dispatcher import Dispatcher
from serve.dispatch.store import JobStore
from serve.config import LimitsConfig, RetentionConfig

async def main():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    dispatcher = Dispatcher(JobStore(Path(sys.argv[1])), LimitsConfig(), RetentionConfig(), c.NoMetrics())
    await dispatcher.start()
    # No file may grow: what a full disk does, for this process alone.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    try:
        await dispatcher.cancel_or_remove(c.caller(), sys.argv[2])
    except ProblemError as error:
        job = dispatcher.job(c.caller(), sys.argv[2])
        print(error.status, error.detail, job.progress.state, flush=True)
    # As SIGKILL leaves it.
    import os
    os._exit(0)

asyncio.run(main())
"""


def test_a_job_is_only_cancelled_once_that_is_stored(config: ServeConfig, in_process: InProcess) -> None:
    async def begin() -> str:
        async with in_process(config) as service:
            service.dispatcher.schedulers.clear()
            asked = {"generator": "small", "conditions": CONDITIONS[:1], "number": 2}
            service.dispatcher._served = lambda: {"small": _served(service)}  # type: ignore[method-assign]
            return str((await service.client.post("/v1/jobs", json=asked, headers=ALICE)).json()["id"])

    id = asyncio.run(begin())
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FULL_DISK), config.storage, id],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3], check=True,
    )  # fmt: skip
    status, _, said = found.stdout.partition(" ")
    assert status == "507", found.stdout + found.stderr
    assert f"job {id} stays for now: " in said and "cannot be written" in said
    assert said.rstrip().endswith("queued"), "nobody was told that it is cancelled, and it goes on"

    async def check(service: Service) -> None:
        assert (await service.ended(id))["state"] == "succeeded"

    start_again(config, in_process, check)


def _served(service: Service) -> Any:
    from serve.dispatch.served_generator import ServedGenerator

    return ServedGenerator("small", service.replica.generator.config, 1)
