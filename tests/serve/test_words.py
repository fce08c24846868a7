"""Generators that are asked in words: what was understood is told, and what is not sure is refused."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from rpg.client import Patience, UnderstoodDescription
from rpg.client.calls import Calls
from rpg.client.transport import AsyncTransport
from rpg.config import SamplingConfig
from rpg.encoders import open_encoder
from rpg.errors import RPGError
from rpg.sampling.job import GenerationJob
from rpg.words.properties import CLASSES
from rpg.words.sentences import SentenceUnderstanding
from rpg.words.understood import Understood
from serve.config import GeneratorEntry, ServeConfig
from serve.dispatch.records import JobManifest
from tests.serve.conftest import Service, bearer, token_entry
from tests.serve.http.test_routes import problem
from tests.words_models import UNDERSTOOD, UNSURE

ALICE = bearer("alice")
TEXTS = ["any cat", "a cat or a dog"]
UNDERSTAND = "/v1/generators/small/understand"

InProcess = Callable[..., AbstractAsyncContextManager[Service]]
Using = Callable[[Callable[[Service], Awaitable[None]]], None]


@pytest.fixture
def asked_config(asked_generator: Path, words_package: Path, tmp_path: Path) -> ServeConfig:
    return ServeConfig(
        storage=str(tmp_path / "storage"),
        roots=[str(asked_generator.parent)],
        generators=[GeneratorEntry("small", str(asked_generator), num_gpus=0)],
        tokens=[token_entry("alice"), token_entry("reader")],
    )


@pytest.fixture
def using(asked_config: ServeConfig, in_process: InProcess) -> Using:
    """`using(function)`: run a coroutine function with the service."""

    def call(function: Callable[[Service], Awaitable[None]]) -> None:
        async def run() -> None:
            async with in_process(asked_config) as service:
                await function(service)

        asyncio.run(run())

    return call


@pytest.fixture
def expected(words_model: Path, words_package: Path) -> Callable[[str], dict[str, Any]]:
    """What the service is to say of a description."""
    understanding = open_encoder(words_model)
    assert isinstance(understanding, SentenceUnderstanding)

    def of(text: str) -> dict[str, Any]:
        understood = understanding.understand(text)
        rows = zip(CLASSES, understood.probabilities, strict=True)
        classes = [{"name": name, "probability": chance, "meant": chance > 0.5} for name, chance in rows]
        return {"classes": classes, "sureness": understood.sureness, "is_sure": understood.is_sure}

    return of


async def post(service: Service, path: str, **body: Any) -> httpx.Response:
    return await service.client.post(path, json=body, headers=ALICE)


async def get(service: Service, path: str) -> Any:
    return (await service.client.get(path, headers=ALICE)).json()


def test_a_job_carries_what_was_understood(
    using: Using, asked_config: ServeConfig, expected: Callable[[str], dict[str, Any]]
) -> None:
    async def run(service: Service) -> None:
        info = await get(service, "/v1/generators/small")
        assert (info["descriptions"], info["classes"], info["condition_size"]) == (True, list(CLASSES), 10)
        job = (await post(service, "/v1/jobs", generator="small", descriptions=TEXTS, seed=5)).json()
        assert job["understood"] == [expected(text) for text in TEXTS]
        assert (await service.ended(job["id"]))["understood"] == job["understood"]
        manifest = json.loads(Path(asked_config.storage, "jobs", job["id"], "job.json").read_text())
        bits = [list(map(float, UNDERSTOOD[text])) for text in TEXTS]
        assert manifest["job"]["conditions"] == bits
        by_bits = (await post(service, "/v1/jobs", generator="small", conditions=bits, seed=5)).json()
        assert by_bits["understood"] is None
        await service.ended(by_bits["id"])
        for i in range(2):
            words, numbers = [
                await service.client.get(f"/v1/jobs/{each['id']}/models/{i}", headers=ALICE)
                for each in (job, by_bits)
            ]
            assert words.content == numbers.content and words.status_code == 200

    using(run)


def test_what_was_understood_outlives_a_restart(
    using: Using, expected: Callable[[str], dict[str, Any]]
) -> None:
    job: dict[str, Any] = {}

    async def ask(service: Service) -> None:
        job.update((await post(service, "/v1/jobs", generator="small", descriptions=TEXTS)).json())
        await service.ended(job["id"])

    async def look(service: Service) -> None:
        found = await get(service, f"/v1/jobs/{job['id']}")
        assert found["understood"] == [expected(text) for text in TEXTS]

    using(ask)
    using(look)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda understood: understood.pop(), "expected what was understood of each description"),
        (lambda understood: understood[1]["probabilities"].pop(), "expected probabilities of 10 classes"),
        (lambda understood: understood[0].update(sureness=1.5), "expected probabilities from 0 to 1"),
        (
            lambda understood: understood[0].update(sureness=float("nan")),
            "expected probabilities from 0 to 1",
        ),
    ],
)
def test_a_manifest_that_lies_about_it_is_refused(change: Callable[[Any], object], words: str) -> None:
    understood = Understood((0.9, *[0.1] * 9), 0.9, True)
    job = GenerationJob([[1.0] + [0.0] * 9] * 2, 1, 0, SamplingConfig())
    manifest = JobManifest(
        "id", "alice", "small", 0, 1.0, job, descriptions=TEXTS, encoder="3" * 64, understood=[understood] * 2
    )
    assert JobManifest.from_json(manifest.to_json()) == manifest
    content = manifest.to_json()
    change(content["understood"])
    with pytest.raises(RPGError, match=words):
        JobManifest.from_json(content)


def test_generate_says_what_was_understood_in_a_header(
    using: Using, expected: Callable[[str], dict[str, Any]]
) -> None:
    async def run(service: Service) -> None:
        made = await post(service, "/v1/generate", generator="small", description="any cat", seed=5)
        assert made.status_code == 200
        assert json.loads(made.headers["rpg-understood"]) == expected("any cat")
        bits = list(map(float, UNDERSTOOD["any cat"]))
        by_bits = await post(service, "/v1/generate", generator="small", condition=bits, seed=5)
        assert by_bits.content == made.content and "rpg-understood" not in by_bits.headers

    using(run)


def test_understanding_alone_makes_nothing(using: Using, expected: Callable[[str], dict[str, Any]]) -> None:
    async def run(service: Service) -> None:
        for text in (*UNDERSTOOD, UNSURE):
            answer = await post(service, UNDERSTAND, description=text)
            assert (answer.status_code, answer.json()) == (200, expected(text))
        assert (await get(service, "/v1/jobs"))["jobs"] == []
        calls = Calls("http://127.0.0.1", AsyncTransport(service.client), Patience())
        service.client.headers.update(ALICE)
        understood = await calls.understand("small", UNSURE)
        assert isinstance(understood, UnderstoodDescription) and not understood.is_sure

    using(run)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (UNSURE, "not sure what is meant; perhaps"),
        ("one", "means none of the 10 classes"),
        ("any", "means all of the 10 classes"),
        (" \n", "expected words"),
        ("cat " * 300, "expected at most 128 tokens"),
        ("x" * 2001, "String should have at most 2000 characters"),
    ],
)
def test_what_no_network_is_made_for_is_one_line(using: Using, text: str, words: str) -> None:
    async def run(service: Service) -> None:
        for path, asked in (
            ("/v1/jobs", {"descriptions": ["any cat", text]}),
            ("/v1/generate", {"description": text}),
        ):
            line = problem(await post(service, path, generator="small", **asked), 422)
            assert words in line and "\n" not in line
        assert (await get(service, "/v1/jobs"))["jobs"] == []

    using(run)


def test_understanding_is_refused_where_there_is_none(using: Using) -> None:
    async def run(service: Service) -> None:
        missing = await post(service, "/v1/generators/none/understand", description="any cat")
        assert problem(missing, 404) == "no generator 'none'"
        assert "at least 1 character" in problem(await post(service, UNDERSTAND, description=""), 422)
        assert "Field required" in problem(await post(service, UNDERSTAND), 422)
        reader = await service.client.post(
            UNDERSTAND, json={"description": "any cat"}, headers=bearer("reader")
        )
        assert problem(reader, 403) == "this token lacks the scope 'submit'"
        scheduler = service.dispatcher.schedulers["small"]
        scheduler.replicas = None
        waits = await post(service, UNDERSTAND, description="any cat")
        assert problem(waits, 503) == "generator 'small' has not started yet"

    using(run)


def test_a_text_encoder_names_no_classes(describing_config: ServeConfig, in_process: InProcess) -> None:
    async def run() -> None:
        async with in_process(describing_config) as service:
            assert (await get(service, "/v1/generators/small"))["classes"] is None
            refused = await post(service, UNDERSTAND, description="cat")
            assert problem(refused, 422) == "generator 'small' has no words model, which would name classes"
            job = (await post(service, "/v1/jobs", generator="small", descriptions=["cat"])).json()
            assert job["understood"] is None

    asyncio.run(run())
