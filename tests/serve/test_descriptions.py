"""Jobs that are asked for by descriptions: the same networks as by their embeddings, and refusals."""

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from rpg.client import GeneratorInfo, Patience
from rpg.client.calls import Calls
from rpg.client.transport import AsyncTransport
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.generate import run_job
from rpg.sampling.job import GenerationJob
from rpg.text_encoder import TextEncoder
from serve.config import ServeConfig
from serve.dispatch.lease import Embedded, Replicas
from tests.serve.conftest import Service, bearer
from tests.serve.http.test_routes import problem
from tests.text_encoders import save_encoder

TEXTS = ["Is it a cat?", "one, two or three dogs"]
ALICE = bearer("alice")
JOB = {"generator": "small", "descriptions": TEXTS, "number": 2, "seed": 5}

InProcess = Callable[..., AbstractAsyncContextManager[Service]]
Using = Callable[..., None]


@pytest.fixture
def using(describing_config: ServeConfig, in_process: InProcess) -> Using:
    """`using(function, wrap=...)`: run a coroutine function with the service."""

    def call(function: Callable[[Service], Awaitable[None]], **options: Any) -> None:
        async def run() -> None:
            async with in_process(describing_config, **options) as service:
                await function(service)

        asyncio.run(run())

    return call


@pytest.fixture
def embeddings(text_encoder: Path) -> list[list[float]]:
    encoder = TextEncoder(text_encoder)
    return [encoder.encode(text) for text in TEXTS]


@pytest.fixture
def files(describing: Generator, embeddings: list[list[float]], tmp_path: Path) -> list[bytes]:
    """The files that the job has to make."""
    job = GenerationJob(embeddings, 2, 5, describing.config.sampling)
    return [path.read_bytes() for path in run_job(describing, job, range(4), tmp_path / "expected")]


async def post(service: Service, path: str = "/v1/jobs", **body: Any) -> httpx.Response:
    return await service.client.post(
        path, json={**JOB, **body} if path == "/v1/jobs" else body, headers=ALICE
    )


def test_descriptions_make_the_same_files_as_their_embeddings(
    using: Using, describing_config: ServeConfig, embeddings: list[list[float]], files: list[bytes]
) -> None:
    async def run(service: Service) -> None:
        info = (await service.client.get("/v1/generators/small", headers=ALICE)).json()
        assert (info["descriptions"], info["condition_size"]) == (True, 32)
        job = (await post(service)).json()
        assert job["models"] == 4
        assert (await service.ended(job["id"]))["state"] == "succeeded"
        models = (await service.client.get(f"/v1/jobs/{job['id']}/models", headers=ALICE)).json()["models"]
        assert [model["description"] for model in models] == [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1]]
        for i, expected in enumerate(files):
            made = await service.client.get(f"/v1/jobs/{job['id']}/models/{i}", headers=ALICE)
            assert made.content == expected
        manifest = json.loads(
            Path(describing_config.storage, "jobs", job["id"], "job.json").read_text(encoding="utf-8")
        )
        assert manifest["job"]["conditions"] == embeddings
        assert manifest["descriptions"] == TEXTS

        one = await post(service, "/v1/generate", generator="small", description=TEXTS[0], seed=5)
        by_embedding = await post(service, "/v1/generate", generator="small", condition=embeddings[0], seed=5)
        assert one.status_code == by_embedding.status_code == 200
        assert one.content == by_embedding.content

    using(run)


def test_the_same_key_stands_for_the_same_job(using: Using) -> None:
    asked: list[list[str]] = []

    def counting(replica: Any) -> Any:
        embed = replica.embed

        async def counted(descriptions: list[str]) -> Embedded | str:
            asked.append(descriptions)
            result: Embedded | str = await embed(descriptions)
            return result

        replica.embed = counted
        return replica

    async def run(service: Service) -> None:
        headers = {**ALICE, "Idempotency-Key": "once"}
        answers = [await service.client.post("/v1/jobs", json=JOB, headers=headers) for _ in range(3)]
        assert len({answer.json()["id"] for answer in answers}) == 1
        assert asked == [TEXTS]
        other = {**JOB, "descriptions": TEXTS[:1]}
        answer = await service.client.post("/v1/jobs", json=other, headers=headers)
        assert "stands for another request" in problem(answer, 422)

    using(run, wrap=counting)


def test_after_a_restart_no_description_is_read_again(
    using: Using, describing_config: ServeConfig, files: list[bytes]
) -> None:
    async def never(descriptions: list[str]) -> Embedded | str:
        raise AssertionError("read again")

    def deaf(replica: Any) -> Any:
        replica.embed = never
        return replica

    job_id = ""

    async def ask(service: Service) -> None:
        nonlocal job_id
        job_id = (await post(service, priority=3)).json()["id"]
        await service.client.delete(f"/v1/jobs/{job_id}", headers=ALICE)

    async def make(service: Service) -> None:
        assert (await service.ended(job_id))["state"] == "succeeded"
        for i, expected in enumerate(files):
            assert service.store.model(job_id, i).read_bytes() == expected

    using(ask)
    directory = Path(describing_config.storage, "jobs", job_id)
    shutil.rmtree(directory / "models", ignore_errors=True)
    (directory / "state.json").unlink()
    using(make, wrap=deaf)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conditions": [[0.0] * 32]}, "descriptions: expected either these or conditions, got both"),
        ({"descriptions": None}, "conditions: this generator needs ones of 32 values, or descriptions"),
        ({"descriptions": []}, "descriptions: List should have at least 1 item"),
        ({"descriptions": "cat"}, "descriptions: Input should be a valid list"),
        ({"descriptions": ["cat", 3]}, "descriptions.1: Input should be a valid string"),
        ({"descriptions": [""]}, "descriptions.0: String should have at least 1 character"),
        ({"descriptions": ["x" * 2001]}, "descriptions.0: String should have at most 2000 characters"),
        ({"descriptions": ["cat", " \n"]}, r"description ' \n': expected words, found nothing"),
        ({"descriptions": ["cat " * 20]}, "expected at most 16 tokens, as the encoder reads, got 22"),
        ({"descriptions": ["cat"] * 65}, "descriptions: expected at most 64 (limits.descriptions), got 65"),
        ({"number": 5001}, "number: expected at most 10000 models (limits.models_per_job), got 10002"),
        ({"steps": 1001}, "steps: expected at most 1000"),
    ],
)
def test_what_cannot_be_made_is_refused_with_one_line(
    using: Using, change: dict[str, Any], words: str
) -> None:
    async def run(service: Service) -> None:
        assert words in problem(await post(service, **change), 422)
        assert (await service.client.get("/v1/jobs", headers=ALICE)).json()["jobs"] == []

    using(run)


def test_a_generator_without_an_encoder_refuses_descriptions(
    config: ServeConfig, in_process: InProcess
) -> None:
    async def run() -> None:
        async with in_process(config) as service:
            info = (await service.client.get("/v1/generators/small", headers=ALICE)).json()
            assert info["descriptions"] is False
            line = "descriptions: generator 'small' has no text encoder; expected conditions"
            assert problem(await post(service), 422) == line
            answer = await post(service, "/v1/generate", generator="small", description="cat")
            assert problem(answer, 422) == line

    asyncio.run(run())


def test_descriptions_that_no_replica_reads_are_refused(using: Using, describing_config: ServeConfig) -> None:
    answers: list[Any] = []

    def failing(replica: Any) -> Any:
        async def embed(descriptions: list[str]) -> Embedded | str:
            answer = answers.pop()
            if answer is None:
                await asyncio.sleep(60)
            raise answer

        replica.embed = embed
        return replica

    async def run(service: Service) -> None:
        for answer in (None, RuntimeError("lost")):
            answers.append(answer)
            refused = await post(service)
            line = "no replica of generator 'small' has read the descriptions; try once more"
            assert problem(refused, 503) == line
            assert refused.headers["retry-after"] == "1"
        # The queue has room again for the models of the requests that were refused.
        describing_config.limits.queued_models = describing_config.limits.models_per_job = 4
        scheduler = service.dispatcher.schedulers["small"]
        scheduler.replicas, replicas = None, scheduler.replicas
        assert problem(await post(service), 503) == "generator 'small' has not started yet"
        scheduler.replicas = replicas
        by_condition = {"descriptions": None, "conditions": [[0.0] * 32], "number": 4}
        assert (await post(service, **by_condition)).status_code == 202

    using(run, wrap=failing, embed_seconds=0.1)


def test_a_job_with_embeddings_of_a_replaced_encoder_fails(using: Using) -> None:
    def older(replica: Any) -> Replicas:
        embed = replica.embed

        async def embed_with_another(descriptions: list[str]) -> Embedded | str:
            embedded = await embed(descriptions)
            return replace(embedded, encoder="3" * 64)

        replica.embed = embed_with_another
        result: Replicas = replica
        return result

    async def run(service: Service) -> None:
        job = await service.ended((await post(service)).json()["id"])
        assert (job["state"], job["finished"]) == ("failed", 0)
        assert job["error"] == (
            "generator 'small' was replaced by one with another text encoder than the "
            "descriptions were read with"
        )

    using(run, wrap=older)


def test_an_encoder_that_cannot_be_used_ends_the_start(
    describing_config: ServeConfig, described: Path, in_process: InProcess, tmp_path: Path
) -> None:
    shutil.copytree(described, tmp_path / "small")
    shutil.rmtree(tmp_path / "small" / "encoder")
    save_encoder(tmp_path / "small" / "encoder", seed=1)
    describing_config.generators[0].path = str(tmp_path / "small")

    async def run() -> None:
        async with in_process(describing_config):
            pass

    with pytest.raises(RPGError, match="small/encoder: not the text encoder that the conditions came from"):
        asyncio.run(run())


def test_the_client_asks_for_models_by_descriptions(using: Using, files: list[bytes], tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        service.client.headers.update(ALICE)
        calls = Calls("http://127.0.0.1", AsyncTransport(service.client), Patience())
        (info,) = await calls.generators()
        assert isinstance(info, GeneratorInfo) and info.descriptions
        job = await calls.submit("small", number=2, seed=5, descriptions=TEXTS)
        await service.ended(job.id)
        paths = await calls.download(job.id, tmp_path / "models")
        assert [path.read_bytes() for path in paths] == files
        models, _ = await calls._models(job.id)
        assert models[3].description == TEXTS[1]
        content = await calls.generate("small", seed=5, description=TEXTS[0])
        one = await post(service, "/v1/generate", generator="small", description=TEXTS[0], seed=5)
        assert content == one.content
        for wrong in ("cat", ["cat", 3]):
            with pytest.raises(RPGError, match="descriptions: expected a list of texts"):
                await calls.submit("small", descriptions=wrong)  # type: ignore[arg-type]

    using(run)
