"""Models that are directories over HTTP: a tar, single files, an archive, and the client's downloads."""

import asyncio
import hashlib
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from rpg.client import Patience
from rpg.client.calls import Calls
from rpg.client.transport import AsyncTransport
from rpg.collection.companions import Companions
from rpg.collection.layout import Layout
from rpg.config import RecurrentKind, SamplingConfig, Solver
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.generate import run_job
from rpg.sampling.job import GenerationJob
from serve.config import GeneratorEntry, ServeConfig
from tests.serve.conftest import CONDITIONS, TOKENS, Calling, bearer, token_entry

ALICE = bearer("alice")
JOB = {"generator": "small", "conditions": CONDITIONS, "number": 2, "seed": 3}
COMPANIONS = Companions({"adapter_config.json": b'{"r": 4}', "tokenizer.json": b"{}" * 1000})
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def adapters(make_generator: Callable[..., Generator], make_layout: Callable[..., Layout]) -> Generator:
    layout = make_layout(16).with_companions(COMPANIONS)
    generator = make_generator(layout, recurrent=RecurrentKind.lstm)
    generator.config.sampling = SamplingConfig(solver=Solver.ddim, steps=3, token_batch=32)
    return generator


@pytest.fixture(scope="module")
def directories(adapters: Generator, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, bytes]]:
    """Files by name of each model of `JOB`, as `run_job` makes them on its own."""
    job = GenerationJob(CONDITIONS, 2, 3, adapters.config.sampling)
    paths = run_job(adapters, job, range(len(job)), tmp_path_factory.mktemp("expected"))
    return [{file.name: file.read_bytes() for file in path.iterdir()} for path in paths]


@pytest.fixture
def config(adapters: Generator, tmp_path: Path) -> ServeConfig:
    adapters.save_pretrained(tmp_path / "roots" / "small")
    return ServeConfig(
        storage=str(tmp_path / "storage"),
        roots=[str(tmp_path / "roots")],
        generators=[GeneratorEntry("small", str(tmp_path / "roots" / "small"), num_gpus=0)],
        tokens=[token_entry(name) for name in TOKENS],
    )


async def ended_job(service: Any) -> str:
    job: str = (await service.client.post("/v1/jobs", json=JOB, headers=ALICE)).json()["id"]
    assert (await service.ended(job))["state"] == "succeeded"
    return job


def unpacked(content: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def within(directory: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {f"{directory}/{name}": content for name, content in files.items()}


def test_a_model_is_a_tar_its_files_and_part_of_the_archive(
    calling: Calling, directories: list[dict[str, bytes]]
) -> None:
    async def run(service: Any) -> None:
        client = service.client
        job = await ended_job(service)
        answer = await client.get(f"/v1/jobs/{job}/models/3", headers=ALICE)
        assert answer.headers["content-type"] == "application/x-tar"
        assert answer.headers["content-disposition"] == f'attachment; filename="{job}_model_000003.tar"'
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert unpacked(answer.content) == within("model_000003", directories[3])

        listed = (await client.get(f"/v1/jobs/{job}/models", headers=ALICE)).json()
        assert listed["weights"] == WEIGHTS
        assert {each["name"]: each["sha256"] for each in listed["companions"]} == COMPANIONS.digests
        assert {each["name"]: each["bytes"] for each in listed["companions"]} == {
            "adapter_config.json": 8, "tokenizer.json": 2000
        }  # fmt: skip
        for index, files in enumerate(directories):
            assert listed["models"][index]["sha256"] == hashlib.sha256(files[WEIGHTS]).hexdigest()
            assert listed["models"][index]["bytes"] == len(files[WEIGHTS])
        for name, content in directories[3].items():
            file = await client.get(f"/v1/jobs/{job}/models/3/files/{name}", headers=ALICE)
            assert file.content == content
            assert file.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
        for name in ("config.json", "..%2Fjob.json", "model_000003.safetensors"):
            missing = await client.get(f"/v1/jobs/{job}/models/3/files/{name}", headers=ALICE)
            assert missing.status_code in (404, 422)

        archive = await client.get(f"/v1/jobs/{job}/archive", headers=ALICE)
        assert int(archive.headers["content-length"]) == len(archive.content)
        assert unpacked(archive.content) == {
            name: content
            for index, files in enumerate(directories)
            for name, content in within(f"{job}/model_{index:06d}", files).items()
        }
        asked = {"generator": "small", "condition": CONDITIONS[0], "seed": 3}
        one = await client.post("/v1/generate", json=asked, headers=ALICE)
        assert sorted(unpacked(one.content)) == sorted(within("model_000000", directories[0]))
        service.store.model(job, 3).unlink()
        gone = await client.get(f"/v1/jobs/{job}/models/3", headers=ALICE)
        assert (gone.status_code, "is gone from storage" in gone.json()["detail"]) == (404, True)

    calling(run)


def test_parts_of_a_tar_fit_together(calling: Calling) -> None:
    async def run(service: Any) -> None:
        job = await ended_job(service)
        path = f"/v1/jobs/{job}/models/1"
        whole = await service.client.get(path, headers=ALICE)
        content, size = whole.content, len(whole.content)
        # Boundaries of records, of files, and all around them.
        places = sorted({*range(0, size, 509), 511, 512, 513, 1023, 1024, 1025, size - 1024, size - 1, size})
        for start, end in itertools.pairwise(places):
            headers = {**ALICE, "Range": f"bytes={start}-{end - 1}", "If-Range": whole.headers["etag"]}
            part = await service.client.get(path, headers=headers)
            assert (part.status_code, part.content) == (206, content[start:end])
            assert part.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
        known = await service.client.get(path, headers={**ALICE, "If-None-Match": whole.headers["etag"]})
        assert known.status_code == 304
        other = await service.client.get(f"/v1/jobs/{job}/models/0", headers=ALICE)
        assert other.headers["etag"] != whole.headers["etag"]

    calling(run)


def test_the_client_makes_the_directories_that_rpg_generate_makes(
    calling: Calling, directories: list[dict[str, bytes]], tmp_path: Path
) -> None:
    async def run(service: Any) -> None:
        job = await ended_job(service)
        service.client.headers.update(ALICE)
        client = Calls("http://127.0.0.1", AsyncTransport(service.client), Patience(), 0.02)
        out = tmp_path / "new"
        told: list[tuple[int, int]] = []
        paths = await client.download(job, out, lambda *bytes: told.append(bytes))
        assert [path.name for path in paths] == [f"model_{index:06d}" for index in range(4)]
        assert sorted(out.iterdir()) == paths
        assert [{file.name: file.read_bytes() for file in path.iterdir()} for path in paths] == directories
        total = sum(len(files[WEIGHTS]) for files in directories)
        assert told[-1] == (total, total)
        inodes = [(path / WEIGHTS).stat().st_ino for path in paths]
        await client.download(job, out)
        assert [(path / WEIGHTS).stat().st_ino for path in paths] == inodes
        (paths[0] / "adapter_config.json").write_text("{}")
        with pytest.raises(RPGError, match=r"model_000000: something else than model 0 of this job"):
            await client.download(job, out)
        assert await client.generate("small", CONDITIONS[0], 3) != b""

    calling(run)


def test_companions_outlive_the_service_and_the_generator(
    config: ServeConfig, in_process: Callable[..., Any], directories: list[dict[str, bytes]],
    make_generator: Callable[..., Generator], make_layout: Callable[..., Layout],
) -> None:  # fmt: skip
    """After a restart with another generator, of models that are files, the job's models are still whole."""

    async def first() -> str:
        async with in_process(config) as service:
            return await ended_job(service)

    async def second(job: str) -> None:
        async with in_process(config) as service:
            answer = await service.client.get(f"/v1/jobs/{job}/models/0", headers=ALICE)
            assert unpacked(answer.content) == within("model_000000", directories[0])
            new = await ended_job(service)
            answer = await service.client.get(f"/v1/jobs/{new}/models/0", headers=ALICE)
            assert answer.headers["content-type"] == "application/octet-stream"
            name = f"/v1/jobs/{new}/models/0/files/model_000000.safetensors"
            assert (await service.client.get(name, headers=ALICE)).content == answer.content
            listed = (await service.client.get(f"/v1/jobs/{new}/models", headers=ALICE)).json()
            assert (listed["weights"], listed["companions"]) == (None, [])

    job = asyncio.run(first())
    path = Path(config.generators[0].path)
    other = make_generator(make_layout(16), recurrent=RecurrentKind.lstm)
    other.config.sampling = SamplingConfig(solver=Solver.ddim, steps=3, token_batch=32)
    other.save_pretrained(path)
    asyncio.run(second(job))


def test_a_model_found_after_a_kill_is_whole(
    config: ServeConfig, in_process: Callable[..., Any], directories: list[dict[str, bytes]]
) -> None:
    """A state that names no model: the next dispatcher finds the weights, and the files beside them."""

    async def first() -> str:
        async with in_process(config) as service:
            return await ended_job(service)

    job = asyncio.run(first())
    state = Path(config.storage) / "jobs" / job / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "state": "running", "ended": None, "made": []}))

    async def second() -> None:
        async with in_process(config) as service:
            assert (await service.ended(job))["finished"] == 4
            for index, files in enumerate(directories):
                answer = await service.client.get(f"/v1/jobs/{job}/models/{index}", headers=ALICE)
                assert unpacked(answer.content) == within(f"model_{index:06d}", files)

    asyncio.run(second())
