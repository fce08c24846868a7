"""What version 0.2.0 left on disk is read, goes on, and comes out the same: made with 0.2.0, kept beside."""

import asyncio
import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rpg.collection.collection import Collection
from rpg.collection.shards import ShardedCollection
from rpg.generator.generator import Generator
from rpg.sampling.generate import generate_models
from serve.config import GeneratorEntry, RetentionConfig, ServeConfig
from tests.serve.conftest import bearer, in_process, token_entry

__all__ = ["in_process"]

FILES = Path(__file__).parent / "version_0_2"


def assert_alike(found: Path, expected: Path) -> None:
    """The same tensors but for the rounding of another processor, and the same provenance."""
    with safe_open(found, framework="pt") as ours, safe_open(expected, framework="pt") as theirs:
        assert ours.metadata() == theirs.metadata()
    tensors = load_file(expected)
    assert load_file(found).keys() == tensors.keys()
    for name, tensor in load_file(found).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=1e-4, atol=1e-5)


def test_a_collection_and_its_shards(tmp_path: Path) -> None:
    collection = Collection.load(FILES / "collection")
    assert [len(entries) for entries in collection.splits.values()] == [4, 0, 2]
    assert [entry.state for entry in collection.entries] == [0, 1] * 3
    for entry in collection.entries:
        collection.check(entry)
    # A copy, since opening shards leaves a file beside them.
    shards = ShardedCollection.open(Path(shutil.copytree(FILES / "shards", tmp_path / "shards")))
    shards.verify()
    for place, entry in enumerate(collection.splits["train"]):
        tokens = shards.layout.encode(collection.read(entry)).tokens
        assert torch.equal(shards.read(place, range(shards.layout.tokens)), tokens.bfloat16().float())


def test_a_generator_makes_the_networks_that_it_made(tmp_path: Path) -> None:
    generator = Generator.from_pretrained(FILES / "generator")
    conditions = [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    paths = generate_models(generator, conditions, 2, 7, tmp_path, generator.config.sampling)
    for path in paths:
        assert_alike(path, FILES / "generated" / path.name)


def test_networks_that_are_there_are_kept(tmp_path: Path) -> None:
    shutil.copytree(FILES / "generated", tmp_path / "generated")
    before = {path.name: path.stat().st_ino for path in (tmp_path / "generated").iterdir()}
    generator = Generator.from_pretrained(FILES / "generator")
    conditions = [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]
    generate_models(generator, conditions, 2, 7, tmp_path / "generated", generator.config.sampling)
    assert {path.name: path.stat().st_ino for path in (tmp_path / "generated").iterdir()} == before


def test_jobs_of_a_service(in_process: Callable[..., AbstractAsyncContextManager], tmp_path: Path) -> None:
    """One had ended, one was cut off after a model that its state names and one that it does not."""
    shutil.copytree(FILES / "service", tmp_path / "service")
    entry = GeneratorEntry(name="small", path=str(FILES / "generator"), num_gpus=0)
    config = ServeConfig(
        storage=str(tmp_path / "service"), roots=[str(FILES)], generators=[entry],
        tokens=[token_entry("alice")], retention=RetentionConfig(days=1e6),
    )  # fmt: skip

    async def run() -> None:
        async with in_process(config) as service:
            assert not service.dispatcher.quarantined
            jobs = (await service.client.get("/v1/jobs", headers=bearer("alice"))).json()["jobs"]
            by_models = {job["sampling"]["solver"]: job for job in jobs}
            ended, interrupted = by_models["dpmpp_2m"], by_models["ddim"]
            assert (ended["state"], ended["finished"], ended["seed"]) == ("succeeded", 4, 7)
            interrupted = await service.ended(interrupted["id"])
            assert (interrupted["state"], interrupted["finished"]) == ("succeeded", 4)
            assert (interrupted["seed"], interrupted["dtype"]) == (2**63 + 5, "bfloat16")
            for index in range(4):
                answer = await service.client.get(
                    f"/v1/jobs/{ended['id']}/models/{index}", headers=bearer("alice")
                )
                expected = FILES / "generated" / f"model_{index:06d}.safetensors"
                assert answer.content == expected.read_bytes()

    asyncio.run(run())
