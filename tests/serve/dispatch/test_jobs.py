"""Jobs from their request to their files: what comes out, what survives, what is refused."""

import asyncio
import copy
import errno
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file

from rpg.client.schema import JobState
from rpg.collection.layout import Layout
from rpg.config import ConditionKind, RecurrentKind, SamplingConfig
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.job import GenerationJob
from rpg.sampling.pack import members_of
from rpg.storage import small_files
from rpg.tasks.binary_digits import BinaryDigits
from rpg.tasks.digits import DigitsNet, digits_images
from serve.config import ServeConfig
from serve.dispatch.lease import GeneratorReport, Lease
from serve.dispatch.records import JobManifest, Made
from serve.dispatch.store import JobStore, is_id, new_id
from serve.replicas.replica import Replica
from tests.s3_server import Proxy, S3Server
from tests.serve.conftest import CONDITIONS, Measurable, bearer, caller

InProcess = Callable[..., Any]
Expected = Callable[..., list[bytes]]


OFTEN = {"tick_seconds": 0.1, "save_seconds": 0.1}
"""Options of a dispatcher that saves its jobs and removes expired ones all the time."""


async def gone(config: ServeConfig, id: str) -> None:
    """Wait until no file of a job is left."""
    async with asyncio.timeout(30):
        while (Path(config.storage) / "jobs" / id).exists():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("pack", [False, True])
def test_models_are_those_of_run_job(
    config: ServeConfig, in_process: InProcess, expected: Expected, pack: bool
) -> None:
    """Four jobs of other seeds, conditions and settings at once, to the byte."""
    asked: list[dict[str, Any]] = [
        {"conditions": CONDITIONS, "number": 40, "seed": 5},
        {"conditions": CONDITIONS[::-1], "number": 3, "seed": 2**63 + 5},
        {"conditions": CONDITIONS, "number": 2, "seed": 5, "solver": "ddpm", "steps": 4},
        {"conditions": CONDITIONS[:1], "number": 5, "guidance": 2.0, "priority": 3},
    ]

    async def run() -> None:
        async with in_process(config) as service:
            answers = [
                await service.client.post(
                    "/v1/jobs", json={"generator": "small", "pack": pack, **job}, headers=bearer("alice")
                )
                for job in asked
            ]
            for answer, job in zip(answers, asked, strict=True):
                assert answer.status_code == 202, answer.text
                id = answer.json()["id"]
                ended = await service.ended(id)
                assert (ended["state"], ended["finished"]) == ("succeeded", ended["models"])
                sampling = {k: v for k, v in job.items() if k in ("solver", "steps", "guidance")}
                whole = expected(job["conditions"], job["number"], job.get("seed", 0), **sampling)
                for index, content in enumerate(whole):
                    got = await service.client.get(f"/v1/jobs/{id}/models/{index}", headers=bearer("alice"))
                    assert got.content == content
                    assert got.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
            assert service.replica.engine.statistics.batches

    asyncio.run(run())


async def submit(service: Any, name: str = "alice", key: str | None = None, **job: Any) -> httpx.Response:
    headers = bearer(name) | ({} if key is None else {"Idempotency-Key": key})
    asked = {"generator": "small", "conditions": CONDITIONS[:1], **job}
    answer: httpx.Response = await service.client.post("/v1/jobs", json=asked, headers=headers)
    return answer


def files(config: ServeConfig, job: str) -> dict[str, bytes]:
    paths = sorted(JobStore(Path(config.storage)).models(job).iterdir())
    return {path.name: path.read_bytes() for path in paths}


def named(content: list[bytes]) -> dict[str, bytes]:
    return {f"model_{i:06d}.safetensors": each for i, each in enumerate(content)}


def test_models_are_made_in_another_dtype(
    config: ServeConfig, in_process: InProcess, expected: Expected
) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            id = (await submit(service, number=3, seed=1, dtype="bfloat16")).json()["id"]
            job = await service.ended(id)
            assert (job["state"], job["dtype"]) == ("succeeded", "bfloat16")

    asyncio.run(run())
    (directory,) = (Path(config.storage) / "jobs").iterdir()
    for index, content in enumerate(expected(CONDITIONS[:1], 3, 1)):
        path = directory / "models" / f"model_{index:06d}.safetensors"
        with safe_open(path, framework="pt") as file:
            assert file.metadata()["rpg.dtype"] == "bfloat16"
        whole = load(content)
        for name, tensor in load_file(path).items():
            assert tensor.equal(whole[name].bfloat16() if whole[name].is_floating_point() else whole[name])


def test_models_are_measured_where_that_is_asked_for(
    config: ServeConfig, in_process: InProcess, measurable: Measurable
) -> None:
    """The service is stopped in the middle and started again: every model has its measures."""
    measurable.of(config)
    condition = measurable.condition
    asked = {"conditions": [condition, condition[::-1]], "number": 20, "evaluate": True}

    async def begin() -> str:
        async with in_process(config) as service:
            id = str((await submit(service, **asked)).json()["id"])
            while len(service.dispatcher.job(caller(), id).progress.made) < 3:
                await asyncio.sleep(0.01)
            return id

    async def go_on(id: str) -> None:
        async with in_process(config) as service:
            job = await service.ended(id)
            assert (job["state"], job["finished"], job["evaluate"]) == ("succeeded", 40, True)
            models = (await service.client.get(f"/v1/jobs/{id}/models", headers=bearer("alice"))).json()[
                "models"
            ]
            labels = [BinaryDigits().labels(each, "test") for each in (condition, condition[::-1])]
            images = digits_images()["test"].images
            for model, path in zip(
                models, sorted(JobStore(Path(config.storage)).models(id).iterdir()), strict=True
            ):
                net = DigitsNet()
                net.load_state_dict(load_file(path))
                with torch.no_grad():
                    right = (net(images)[:, 0] > 0) == labels[model["index"] // 20]
                assert model["accuracy"] == pytest.approx(right.float().mean().item())
                assert (model["similarity"] is None) == (model["index"] >= 20)
            mean = sum(model["accuracy"] for model in models) / 40
            assert job["accuracy"] == pytest.approx(mean)

    id = asyncio.run(begin())
    state = Path(config.storage) / "jobs" / id / "state.json"
    known = json.loads(state.read_text())
    state.write_text(json.dumps({**known, "made": known["made"][:1]}))
    asyncio.run(go_on(id))


@pytest.mark.parametrize("kind", [ConditionKind.permutation, ConditionKind.none])
def test_networks_without_conditions_are_not_measured(
    config: ServeConfig,
    in_process: InProcess,
    measurable: Measurable,
    make_generator: Callable[..., Generator],
    make_layout: Callable[..., Layout],
    tmp_path: Path,
    kind: ConditionKind,
) -> None:
    """Such a request is refused; such a job that is on storage already fails and says why."""
    measurable.of(config)
    layout = make_layout(576, DigitsNet().state_dict())
    make_generator(layout, RecurrentKind.lstm, condition=kind).save_pretrained(tmp_path / "roots" / "other")
    config.generators[0].path = str(tmp_path / "roots" / "other")
    reason = (
        "evaluate: generator 'small' is served without a test: with neither a task family, nor a "
        "command, nor a collection whose conditions say what is right"
    )
    manifest = JobManifest(
        new_id(), "alice", "small", 0, time.time(), GenerationJob(None, 2, 0, SamplingConfig()), evaluate=True
    )
    JobStore(Path(config.storage)).create(manifest)

    async def run() -> None:
        async with in_process(config) as service:
            answer = await submit(service, conditions=None, evaluate=True)
            assert (answer.status_code, answer.json()["detail"]) == (422, reason)
            listed = await service.client.get("/v1/generators/small", headers=bearer("alice"))
            assert listed.json()["evaluates"] is False
            job = await service.ended(manifest.id)
            assert (job["state"], job["error"]) == ("failed", reason)

    asyncio.run(run())


def test_a_command_measures_networks_without_conditions(
    config: ServeConfig,
    in_process: InProcess,
    make_generator: Callable[..., Generator],
    make_layout: Callable[..., Layout],
    tmp_path: Path,
) -> None:
    """A network that it cannot measure is there all the same, with the reason."""
    layout = make_layout(576, DigitsNet().state_dict())
    path = tmp_path / "roots" / "other"
    make_generator(layout, RecurrentKind.lstm, condition=ConditionKind.none).save_pretrained(path)
    script = tmp_path / "test.py"
    script.write_text(
        "import json, sys\n"
        "from safetensors.torch import load_file\n"
        "if 'model 1' in sys.argv[1]: sys.exit('odd one')\n"
        "print(json.dumps({'norm': float(load_file(sys.argv[1])['head.bias'].norm())}))\n"
    )
    entry = config.generators[0]
    entry.path, entry.evaluate.command = str(path), f"python '{script}' {{checkpoint}}"

    async def run() -> None:
        async with in_process(config) as service:
            listed = await service.client.get("/v1/generators/small", headers=bearer("alice"))
            assert listed.json()["evaluates"] is True
            id = (await submit(service, conditions=None, number=2, evaluate=True)).json()["id"]
            job = await service.ended(id)
            assert job["state"] == "succeeded", job
            answer = await service.client.get(f"/v1/jobs/{id}/models", headers=bearer("alice"))
            first, second = answer.json()["models"]
            file = sorted(JobStore(Path(config.storage)).models(id).iterdir())[0]
            assert first["metrics"] == {"norm": pytest.approx(float(load_file(file)["head.bias"].norm()))}
            assert (first["accuracy"], first["similarity"], first["failure"]) == (None, None, None)
            assert second["metrics"] is None
            assert second["failure"] == "model 1: evaluate.command: exit status 1: odd one"

    asyncio.run(run())


def test_a_small_job_does_not_wait_behind_a_large_one(config: ServeConfig, in_process: InProcess) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            large = (await submit(service, number=5000)).json()["id"]
            small = (await submit(service, number=4, seed=1)).json()["id"]
            await service.ended(small)
            assert service.dispatcher.job(caller(), large).remaining > 4000

    asyncio.run(run())


def test_higher_priorities_are_made_first(config: ServeConfig, in_process: InProcess) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            ids = [(await submit(service, number=300, priority=p)).json()["id"] for p in (-1, 0, 7)]
            await service.ended(ids[2])
            left = [service.dispatcher.job(caller(), id).remaining for id in ids]
            # The others were given the replica before this job came, and while its last models were written.
            assert left[2] == 0, left
            assert min(left[:2]) > 200, left

    asyncio.run(run())


def test_cancelling_stops_within_a_batch(config: ServeConfig, in_process: InProcess) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            id = (await submit(service, number=5000, steps=50)).json()["id"]
            while not service.dispatcher.job(caller(), id).progress.made:
                await asyncio.sleep(0.01)
            answer = await service.client.delete(f"/v1/jobs/{id}", headers=bearer("alice"))
            before = service.replica.engine.statistics.batches
            assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
            await asyncio.sleep(0.5)
            assert service.replica.engine.statistics.batches <= before + 1
            assert service.replica.engine.jobs == 0
            made = files(config, id)
            assert len(made) < 5000 and not [name for name in made if name.endswith(".partial")]
            again = await service.client.delete(f"/v1/jobs/{id}", headers=bearer("alice"))
            assert again.status_code == 204
            assert (await service.client.get(f"/v1/jobs/{id}", headers=bearer("alice"))).status_code == 404
            assert not (Path(config.storage) / "jobs" / id).exists()

    asyncio.run(run())


class Unreliable:
    """Replicas that are lost in the middle of every other lease."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.leases = 0

    async def describe(self) -> GeneratorReport:
        return await self.replica.describe()

    async def make(self, lease: Lease) -> AsyncIterator[list[Made] | str]:
        self.leases += 1
        lost = self.leases % 2
        async with aclosing(self.replica.make(lease)) as events:  # type: ignore[type-var]
            async for event in events:
                if lost and not isinstance(event, str):
                    yield event[:1]
                    raise ConnectionError("the replica is gone")
                yield event


def test_what_lost_replicas_did_not_finish_is_made_by_others(
    config: ServeConfig, in_process: InProcess, expected: Expected
) -> None:
    async def run() -> str:
        async with in_process(config, Unreliable) as service:
            id = (await submit(service, number=40)).json()["id"]
            job = await service.ended(id)
            assert (job["state"], job["finished"]) == ("succeeded", 40)
            return str(id)

    assert files(config, asyncio.run(run())) == named(expected(CONDITIONS[:1], 40))


def test_a_job_that_every_replica_is_lost_at_fails(config: ServeConfig, in_process: InProcess) -> None:
    class Deadly(Unreliable):
        async def make(self, lease: Lease) -> AsyncIterator[list[Made] | str]:
            raise ConnectionError("out of memory")
            yield []

    async def run() -> None:
        async with in_process(config, Deadly, max_lost_replicas=3) as service:
            job = await service.ended((await submit(service)).json()["id"])
            assert job["state"] == "failed"
            assert job["error"] == "3 replicas were lost at it, one after the other: out of memory"

    asyncio.run(run())


def test_an_interrupted_service_goes_on_where_it_was(
    config: ServeConfig, in_process: InProcess, expected: Expected
) -> None:
    """Storage lags behind: the state was never written, and one file is only half written."""

    async def begin() -> str:
        async with in_process(config) as service:
            id = str((await submit(service, number=300, key="k")).json()["id"])
            while len(service.dispatcher.job(caller(), id).progress.made) < 20:
                await asyncio.sleep(0.01)
            return id

    async def go_on(id: str) -> None:
        async with in_process(config) as service:
            assert service.dispatcher.job(caller(), id).remaining <= 280
            assert (await submit(service, number=300, key="k")).json()["id"] == id
            job = await service.ended(id)
            assert (job["state"], job["finished"]) == ("succeeded", 300)
            page = await service.client.get(f"/v1/jobs/{id}/models", headers=bearer("alice"))
            digests = [each["sha256"] for each in page.json()["models"]]
            while len(files(config, id)) > 300:
                await asyncio.sleep(0.01)
            assert digests == [hashlib.sha256(each).hexdigest() for each in files(config, id).values()]

    id = asyncio.run(begin())
    directory = Path(config.storage) / "jobs" / id
    (directory / "state.json").unlink()
    (directory / "models" / ".model_000299.safetensors.1.partial").write_bytes(b"half")
    asyncio.run(go_on(id))
    assert files(config, id) == named(expected(CONDITIONS[:1], 300))


def test_packed_models_are_found_again(
    config: ServeConfig, in_process: InProcess, expected: Expected
) -> None:
    """The state was never written, a pack was cut short, and another's first model was damaged."""
    whole = expected(CONDITIONS[:1], 300)

    async def begin() -> str:
        async with in_process(config) as service:
            id = str((await submit(service, number=300, pack=True)).json()["id"])
            while len(service.dispatcher.job(caller(), id).progress.made) < 150:
                await asyncio.sleep(0.01)
            return id

    async def go_on(id: str) -> None:
        async with in_process(config) as service:
            made = service.dispatcher.job(caller(), id).progress.made
            assert 100 < len(made) < 300
            assert damaged not in made
            assert (await service.ended(id))["finished"] == 300
            page = (await service.client.get(f"/v1/jobs/{id}/models", headers=bearer("alice"))).json()
            assert len({each["pack"] for each in page["models"]}) < 40
            for each in page["models"]:
                path = models / each["pack"]
                with path.open("rb") as file:
                    file.seek(each["offset"])
                    assert file.read(each["bytes"]) == whole[each["index"]]
            archive = await service.client.get(f"/v1/jobs/{id}/archive", headers=bearer("alice"))
            with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
                found = [tar.extractfile(member) for member in tar.getmembers()]
                assert [file.read() for file in found if file is not None] == whole
            asked = {**bearer("alice"), "Range": "bytes=-7"}
            part = await service.client.get(f"/v1/jobs/{id}/models/299", headers=asked)
            assert (part.status_code, part.content) == (206, whole[299][-7:])
        async with in_process(config) as service:
            job = (await service.client.get(f"/v1/jobs/{id}", headers=bearer("alice"))).json()
            assert (job["state"], job["finished"]) == ("succeeded", 300)

    id = asyncio.run(begin())
    models = JobStore(Path(config.storage)).models(id)
    assert isinstance(models, Path)
    (models.parent / "state.json").unlink(missing_ok=True)
    packs = sorted(models.glob("pack_*.tar"))
    assert len(packs) >= 4
    with packs[0].open("r+b") as file:
        file.truncate(packs[0].stat().st_size // 2)
    with packs[1].open("r+b") as file:
        first = next(members_of(file))
        damaged = int(first.name[6:12])
        file.seek(first.offset)
        file.write(b"X" * 100)
    asyncio.run(go_on(id))


def test_a_pack_that_is_too_short_quarantines_a_job_that_has_ended(
    config: ServeConfig, in_process: InProcess
) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            id = (await submit(service, number=3, pack=True)).json()["id"]
            await service.ended(id)
        [pack] = (Path(config.storage) / "jobs" / id / "models").iterdir()
        os.truncate(pack, pack.stat().st_size // 2)
        async with in_process(config) as service:
            reason = service.dispatcher.quarantined[id].reason
            assert re.search(rf"model 1: says \d+ bytes from byte \d+ on; {pack.name} has \d+ bytes", reason)

    asyncio.run(run())


def test_jobs_wait_for_a_generator_that_is_no_longer_served(
    config: ServeConfig, in_process: InProcess, expected: Expected
) -> None:
    async def run() -> str:
        async with in_process(config) as service:
            id = str((await submit(service, number=300)).json()["id"])
            while not service.dispatcher.job(caller(), id).progress.made:
                await asyncio.sleep(0.01)
            served = service.dispatcher.schedulers["small"].served
            await service.dispatcher.remove_generator("small")
            made = len(service.dispatcher.job(caller(), id).progress.made)
            await asyncio.sleep(0.5)
            job = (await service.client.get(f"/v1/jobs/{id}", headers=bearer("alice"))).json()
            assert (job["finished"], job["error"]) == (made, "waits: generator 'small' is not served")
            assert made < 300
            assert (await submit(service)).status_code == 422
            (await service.dispatcher.add_generator(served)).start(service.replica)
            job = await service.ended(id)
            assert (job["state"], job["finished"], job["error"]) == ("succeeded", 300, None)
            return id

    assert files(config, asyncio.run(run())) == named(expected(CONDITIONS[:1], 300))


def test_an_ended_job_is_not_started_again(config: ServeConfig, in_process: InProcess) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            id = (await submit(service, number=2)).json()["id"]
            ended = await service.ended(id)
        async with in_process(config) as service:
            job = (await service.client.get(f"/v1/jobs/{id}", headers=bearer("alice"))).json()
            assert {**job, "version": 0} == {**ended, "version": 0}
            assert service.replica.engine.statistics.batches == 0

    asyncio.run(run())


def test_a_full_disk_fails_the_job_alone_and_a_retry_works(
    config: ServeConfig, in_process: InProcess, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = small_files._write
    full = True

    def limited(directory: int, path: Path, content: bytes) -> None:
        if full and path.name == "model_000002.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(directory, path, content)

    monkeypatch.setattr(small_files, "_write", limited)

    async def run() -> str:
        nonlocal full
        async with in_process(config) as service:
            id = str((await submit(service, number=20, key="k")).json()["id"])
            job = await service.ended(id)
            assert job["state"] == "failed"
            assert job["error"].endswith(
                "model_000002.safetensors: cannot be written: No space left on device"
            )
            other = await service.ended((await submit(service, number=2)).json()["id"])
            assert other["state"] == "succeeded"
            full = False
            again = await submit(service, number=20, key="k")
            assert (again.status_code, again.json()["id"]) == (202, id)
            job = await service.ended(id)
            assert (job["state"], job["finished"], job["error"]) == ("succeeded", 20, None)
            return id

    assert files(config, asyncio.run(run())) == named(expected(CONDITIONS[:1], 20))


def test_a_job_that_cannot_be_stored_is_not_accepted(
    config: ServeConfig, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            with monkeypatch.context() as patch:

                def full(self: JobStore, manifest: JobManifest) -> None:
                    raise RPGError("job.json: cannot be written: No space left on device")

                patch.setattr(JobStore, "create", full)
                answer = await submit(service, key="k")
                assert answer.status_code == 507
                assert "No space left on device" in answer.json()["detail"]
            assert (await submit(service, key="k")).status_code == 202

    asyncio.run(run())


def test_a_job_that_is_stored_is_accepted_whatever_can_be_read(
    config: ServeConfig, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(self: JobStore, manifest: JobManifest) -> None:
        raise RPGError("jobs: cannot be read: the storage cannot be reached")

    async def run() -> None:
        async with in_process(config) as service:
            monkeypatch.setattr(JobStore, "progress", unreadable)
            answer = await submit(service)
            assert answer.status_code == 202
            assert (await service.ended(answer.json()["id"]))["state"] == "succeeded"

    asyncio.run(run())


def test_a_slow_disk_does_not_hold_up_sampling(
    config: ServeConfig, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = small_files._write

    def slow(directory: int, path: Path, content: bytes) -> None:
        time.sleep(0.4)
        write(directory, path, content)

    monkeypatch.setattr(small_files, "_write", slow)

    async def run() -> None:
        async with in_process(config) as service:
            id = (await submit(service, number=24)).json()["id"]
            tokens = 24 * service.replica.generator.layout.tokens
            while service.replica.engine.statistics.tokens < tokens - 9 * 15:
                await asyncio.sleep(0.01)
            assert len(service.dispatcher.job(caller(), id).progress.made) < 12

    asyncio.run(run())


def test_a_damaged_job_is_named_and_the_others_go_on(config: ServeConfig, in_process: InProcess) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            ids = [(await submit(service, number=200, seed=i)).json()["id"] for i in range(4)]
        jobs = Path(config.storage) / "jobs"
        manifest = json.loads((jobs / ids[0] / "job.json").read_text())
        (jobs / ids[0] / "job.json").write_text("{")
        (jobs / ids[1] / "state.json").write_text('{"state": "succeeded", "made": [[7]]}')
        manifest["job"]["conditions"] = [["a"]]
        (jobs / ids[2] / "job.json").write_text(json.dumps(manifest))
        async with in_process(config) as service:
            assert (await service.ended(ids[3]))["state"] == "succeeded"
            listed = (await service.client.get("/v1/jobs", headers=bearer("root"))).json()
            reasons = {each["id"]: each["reason"] for each in listed["quarantined"]}
            assert reasons.keys() == set(ids[:3])
            assert f"{ids[0]}/job.json: cannot be read as a job's manifest" in reasons[ids[0]]
            assert f"{ids[1]}/state.json: not a job's state" in reasons[ids[1]]
            assert "\n" not in "".join(reasons.values())
            assert json.loads((jobs / ids[0] / "quarantined.json").read_text())["reason"] == reasons[ids[0]]
            statuses = [
                (await service.client.get(f"/v1/jobs/{ids[0]}", headers=bearer(name))).status_code
                for name in ("alice", "root")
            ]
            assert statuses == [404, 409]
            assert not (await service.client.get("/v1/jobs", headers=bearer("alice"))).json()["quarantined"]
            removed = await service.client.delete(f"/v1/jobs/{ids[0]}", headers=bearer("root"))
            assert removed.status_code == 204
            assert not (jobs / ids[0]).exists()

    asyncio.run(run())


def test_an_id_is_an_argument_of_a_command_and_no_option() -> None:
    ids = [new_id() for _ in range(2000)]
    assert len(set(ids)) == 2000
    assert all(map(is_id, ids))
    assert not any(id.startswith("-") for id in ids)


def test_one_key_is_one_job(config: ServeConfig, in_process: InProcess) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            answers = await asyncio.gather(*(submit(service, key="k") for _ in range(5)))
            assert len({answer.json()["id"] for answer in answers}) == 1
            other = await submit(service, key="k", seed=1)
            assert other.status_code == 422
            assert "stands for another request" in other.json()["detail"]
            bobs = await submit(service, name="bob", key="k", seed=1)
            assert bobs.status_code == 202
            assert len(list((Path(config.storage) / "jobs").iterdir())) == 2

    asyncio.run(run())


def test_a_job_above_the_limit_is_told_when_to_come_back(config: ServeConfig, in_process: InProcess) -> None:
    config.limits.models_per_job = config.limits.queued_models = 3000

    async def run() -> None:
        async with in_process(config) as service:
            assert (await submit(service, number=2900)).status_code == 202
            answer = await submit(service, number=2900)
            assert answer.status_code == 429
            assert 1 <= int(answer.headers["retry-after"]) <= 3600
            assert "limits.queued_models = 3000" in answer.json()["detail"]
            assert (await submit(service, number=1)).status_code == 202

    asyncio.run(run())


@pytest.mark.parametrize(("days", "gigabytes", "kept"), [(0, 100, 0), (7, 5e-6, 1), (7, 100, 2)])
def test_ended_jobs_are_kept_for_a_time_and_a_size(
    config: ServeConfig,
    in_process: InProcess,
    days: float,
    gigabytes: float,
    kept: int,
) -> None:
    """Two models are about 3,400 bytes."""
    config.retention.days, config.retention.gigabytes = days, gigabytes

    async def run() -> None:
        async with in_process(config, **OFTEN) as service:
            ids = [(await submit(service, number=2)).json()["id"] for _ in range(2)]
            while not all(job.has_ended for job in service.dispatcher.jobs(caller())):
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)
            left = [path.name for path in (Path(config.storage) / "jobs").iterdir()]
            assert len(left) == kept
            assert set(left) <= set(ids)

    asyncio.run(run())


def test_a_job_that_is_revived_while_others_are_removed_stays(
    config: ServeConfig, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark_removed = JobStore.mark_removed
    held, let_go = threading.Event(), threading.Event()

    def held_up(store: JobStore, job_id: str) -> None:
        held.set()
        let_go.wait(30)
        mark_removed(store, job_id)

    monkeypatch.setattr(JobStore, "mark_removed", held_up)

    async def run() -> None:
        # Removals have time enough to come to the second job, after the first was held up.
        async with in_process(config, **OFTEN, removal_seconds=60.0) as service:
            ids = {}
            for key in ("a", "b"):
                ids[key] = (await submit(service, key=key, number=5000, steps=50)).json()["id"]
                job = service.dispatcher.job(caller(), ids[key])
                await service.dispatcher.end(job, JobState.failed, "the disk was full")
            config.retention.days = 0
            assert await asyncio.to_thread(held.wait, 30)
            (left,) = service.dispatcher.jobs(caller())
            key = next(key for key in ids if ids[key] == left.id)
            assert (await submit(service, key=key, number=5000, steps=50)).json()["id"] == left.id
            let_go.set()
            while len(list((Path(config.storage) / "jobs").iterdir())) > 1:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            job = (await service.client.get(f"/v1/jobs/{left.id}", headers=bearer("alice"))).json()
            assert job["state"] in ("queued", "running")

    asyncio.run(run())


def test_a_job_that_is_to_be_revived_while_it_is_removed_becomes_a_new_one(
    config: ServeConfig, in_process: InProcess
) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            id = (await submit(service, key="k", number=5000, steps=50)).json()["id"]
            job = service.dispatcher.job(caller(), id)
            await service.dispatcher.end(job, JobState.failed, "the disk was full")
            async with job.saving:
                removal = asyncio.create_task(
                    service.client.delete(f"/v1/jobs/{id}", headers=bearer("alice"))
                )
                await asyncio.sleep(0.1)
                revival = asyncio.create_task(submit(service, key="k", number=5000, steps=50))
                await asyncio.sleep(0.1)
            assert (await removal).status_code == 204
            answer = await revival
            assert answer.status_code == 202 and answer.json()["id"] != id
            assert [path.name for path in (Path(config.storage) / "jobs").iterdir()] == [answer.json()["id"]]

    asyncio.run(run())


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(root: Path, name: str, new_name: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(root / name))

    monkeypatch.setattr("serve.dispatch.store.rename_below", refuse)


def test_a_job_that_cannot_be_removed_stays_and_whoever_asked_is_told(
    config: ServeConfig, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            id = (await submit(service, key="k")).json()["id"]
            await service.ended(id)
            with monkeypatch.context() as patch:
                read_only(patch)
                answer = await service.client.delete(f"/v1/jobs/{id}", headers=bearer("alice"))
            assert (answer.status_code, answer.headers["content-type"]) == (503, "application/problem+json")
            assert f"jobs/{id}: cannot be removed: Read-only file system" in answer.json()["detail"]
            model = await service.client.get(f"/v1/jobs/{id}/models/0", headers=bearer("alice"))
            assert model.status_code == 200
            assert (await submit(service, key="k")).json()["id"] == id
        async with in_process(config) as service:
            answer = await service.client.delete(f"/v1/jobs/{id}", headers=bearer("alice"))
            assert answer.status_code == 204
        async with in_process(config) as service:
            assert not service.dispatcher.jobs(caller())

    asyncio.run(run())


def test_a_quarantined_job_that_cannot_be_removed_stays(
    config: ServeConfig, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            id = (await submit(service)).json()["id"]
        (Path(config.storage) / "jobs" / id / "job.json").write_text("{")
        async with in_process(config) as service:
            with monkeypatch.context() as patch:
                read_only(patch)
                answer = await service.client.delete(f"/v1/jobs/{id}", headers=bearer("root"))
            assert answer.status_code == 503
            listed = (await service.client.get("/v1/jobs", headers=bearer("root"))).json()
            assert [each["id"] for each in listed["quarantined"]] == [id]

    asyncio.run(run())


def test_an_object_store_that_refuses_keeps_the_job(
    config: ServeConfig, in_process: InProcess, s3: S3Server, proxy: Proxy
) -> None:
    config.storage = f"{s3.bucket('kept')}/service"

    async def run() -> None:
        async with in_process(config) as service:
            id = (await submit(service)).json()["id"]
            await service.ended(id)
            proxy.refuses = lambda method, path: method in ("PUT", "POST", "DELETE")
            answer = await service.client.delete(f"/v1/jobs/{id}", headers=bearer("alice"))
            assert answer.status_code == 503
            assert f"jobs/{id}: cannot be removed" in answer.json()["detail"]
            proxy.refuses = lambda method, path: False
            model = await service.client.get(f"/v1/jobs/{id}/models/0", headers=bearer("alice"))
            assert model.status_code == 200
            answer = await service.client.delete(f"/v1/jobs/{id}", headers=bearer("alice"))
            assert answer.status_code == 204
            assert not s3.content("kept")

    asyncio.run(run())


def test_what_retention_cannot_remove_is_tried_again(
    config: ServeConfig,
    in_process: InProcess,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def run() -> None:
        async with in_process(config, **OFTEN) as service:
            with monkeypatch.context() as patch:
                read_only(patch)
                id = (await submit(service)).json()["id"]
                await service.ended(id)
                config.retention.days = 0
                while "1 jobs were to be removed and stay for now" not in caplog.text:
                    await asyncio.sleep(0.02)
                assert [job.id for job in service.dispatcher.jobs(caller())] == [id]
            await gone(config, id)

    asyncio.run(run())


def test_files_that_outlive_their_job_are_removed_later(
    config: ServeConfig, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove_directory, failures = shutil.rmtree, 2

    def failing(path: str, **options: Any) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        remove_directory(path, **options)

    monkeypatch.setattr(shutil, "rmtree", failing)

    async def run() -> None:
        async with in_process(config, **OFTEN) as service:
            id = (await submit(service)).json()["id"]
            await service.ended(id)
            answer = await service.client.delete(f"/v1/jobs/{id}", headers=bearer("alice"))
            assert answer.status_code == 204
            assert (await service.client.get(f"/v1/jobs/{id}", headers=bearer("alice"))).status_code == 404
            await gone(config, id)
            assert not failures

    asyncio.run(run())


def test_a_clock_that_jumps_ahead_removes_nothing(
    config: ServeConfig, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with in_process(config, **OFTEN) as service:
            id = (await submit(service)).json()["id"]
            await service.ended(id)
            now = time.time()
            for jump in (1e9, -1e9):
                with monkeypatch.context() as patch:
                    patch.setattr(time, "time", lambda jump=jump: now + jump)
                    other = (await submit(service, seed=1)).json()["id"]
                    assert (await service.ended(other))["state"] == "succeeded"
                    await asyncio.sleep(0.3)
            assert len(service.dispatcher.jobs(caller())) == 3

    asyncio.run(run())


def test_a_job_of_another_version_of_the_generator_is_not_mixed(
    config: ServeConfig, in_process: InProcess, generator: Generator, tmp_path: Path
) -> None:
    async def begin() -> str:
        async with in_process(config) as service:
            id = str((await submit(service, number=300)).json()["id"])
            while not service.dispatcher.job(caller(), id).progress.made:
                await asyncio.sleep(0.01)
            return id

    async def go_on(id: str) -> None:
        async with in_process(config) as service:
            job = await service.ended(id)
            assert job["state"] == "failed"
            assert job["error"] == (
                "generator 'small' was replaced by another version while the job was under way"
            )
            assert (await service.ended((await submit(service)).json()["id"]))["state"] == "succeeded"

    id = asyncio.run(begin())
    other = copy.deepcopy(generator)
    with torch.no_grad():
        other.denoiser.get_parameter("output.bias")[0] += 1
    other.save_pretrained(tmp_path / "roots" / "v2")
    config.roots.append(str(tmp_path / "roots"))
    config.generators[0].path = str(tmp_path / "roots" / "v2")
    asyncio.run(go_on(id))


@pytest.mark.parametrize("pack", [False, True])
def test_storage_may_be_a_uri(
    config: ServeConfig, in_process: InProcess, expected: Expected, s3: S3Server, pack: bool
) -> None:
    """The service is stopped in the middle and started again: the models are the same, to the byte."""
    bucket = f"jobs-{pack}".lower()
    config.storage = f"{s3.bucket(bucket)}/service"

    async def begin() -> str:
        async with in_process(config) as service:
            id = str((await submit(service, number=60, pack=pack)).json()["id"])
            while not service.dispatcher.job(caller(), id).progress.made:
                await asyncio.sleep(0.01)
            return id

    async def go_on(id: str) -> None:
        async with in_process(config) as service:
            assert service.dispatcher.job(caller(), id).progress.made
            assert (await service.ended(id))["state"] == "succeeded"
            got = await service.client.get(
                f"/v1/jobs/{id}/models/5", headers={**bearer("alice"), "Range": "bytes=9-99"}
            )
            assert got.content == whole[5][9:100]

    whole = expected(CONDITIONS[:1], 60)
    id = asyncio.run(begin())
    asyncio.run(go_on(id))
    found = s3.content(bucket, f"service/jobs/{id}/models/")
    assert pack or {name.rpartition("/")[2]: content for name, content in found.items()} == named(whole)
    assert not pack or len(found) <= 4
