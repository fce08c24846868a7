"""Whatever was done to a collection or its shards, reading them ends in one line or goes well."""

import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.collection import Collection
from rpg.collection.register import register
from rpg.collection.shards import ShardedCollection
from rpg.errors import RPGError
from tests.mutations import SECRET, SECRET_VARIABLE, Mutation, mutations_of

SHARDS = (
    "shards.json", "entries.arrow", "layout.json", "centre.safetensors", "00000.arrow", "00004.arrow",
    ".verified.json",
)  # fmt: skip
COLLECTION = ("collection.json", "a.safetensors", "b.safetensors", "c.pt")


@pytest.fixture(scope="module")
def shards(
    make_collection: Callable[..., ShardedCollection], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("shards") / "whole"
    make_collection(directory, count=6)
    return directory


@pytest.fixture(scope="module")
def collection(
    make_checkpoints: Callable[..., list[dict[str, Tensor]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    directory = tmp_path_factory.mktemp("collection") / "whole"
    first, second, third = make_checkpoints(3)
    write_checkpoint(directory / "a.safetensors", first, {})
    write_checkpoint(directory / "b.safetensors", second, {})
    torch.save(third, directory / "c.pt")
    register(directory)
    return directory


def scratch(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("hostile")
    (place / "outside").mkdir()
    shutil.copytree(whole, place / "copy")
    return place / "copy", place / "outside"


class Bounds:
    """What reading may take, and what it must leave alone."""

    def __init__(self, outside: Path) -> None:
        self.outside = outside
        self.before = sorted(outside.iterdir())
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.start = time.monotonic()

    def check(self, line: str | None) -> None:
        assert time.monotonic() - self.start < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory < 1_500_000, "kilobytes"
        assert sorted(self.outside.iterdir()) == self.before
        assert line is None or ("\n" not in line and SECRET not in line)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_shards_end_in_one_line(
    shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    directory, outside = scratch(shards, tmp_path_factory)
    name = data.draw(st.sampled_from(SHARDS))
    mutation: Mutation = data.draw(mutations_of(name))
    mutation.apply(directory / name, outside)
    bounds, said = Bounds(outside), None
    try:
        opened = ShardedCollection.open(directory)
        opened.verify()
        for checkpoint in range(len(opened)):
            opened.read(checkpoint, list(range(opened.layout.tokens)))
    except RPGError as error:
        said = str(error)
    bounds.check(said)
    if mutation.is_link and name != ".verified.json":
        assert said is not None and "is a link" in said


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_collection_ends_in_one_line(
    collection: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A user's own checkpoints may be links to files; everything else that is no file is refused."""
    directory, outside = scratch(collection, tmp_path_factory)
    name = data.draw(st.sampled_from(COLLECTION))
    mutation: Mutation = data.draw(mutations_of(name))
    mutation.apply(directory / name, outside)
    bounds, said = Bounds(outside), None
    try:
        opened = Collection.load(directory)
        for entry in opened.entries:
            opened.read_checked(entry)
    except RPGError as error:
        said = str(error)
    bounds.check(said)
    try:
        register(directory)
    except RPGError as error:
        said = str(error)
    bounds.check(said)


NAMES = [
    "../outside/kept.safetensors", "/outside/kept.safetensors", "a/../../outside/kept.safetensors", "..", ".",
    "", "a\0b", "\ud800", "..\\outside",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_collection_names_nothing_outside_of_it(
    collection: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    directory, outside = scratch(collection, tmp_path_factory)
    shutil.copy(directory / "a.safetensors", outside / "kept.safetensors")
    content = json.loads((directory / "collection.json").read_text())
    content["entries"][0]["file"] = name
    (directory / "collection.json").write_text(json.dumps(content))
    with pytest.raises(
        RPGError, match=r"expected a relative path that stays inside the collection$"
    ) as caught:
        Collection.load(directory)
    assert "\n" not in str(caught.value)


def test_a_name_with_line_breaks_stays_one_line(
    collection: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory, _ = scratch(collection, tmp_path_factory)
    (directory / "a.safetensors").rename(directory / "a\nb.safetensors")
    (directory / "a\nb.safetensors").write_bytes(b"damaged")
    with pytest.raises(RPGError) as caught:
        register(directory)
    lines = [str(caught.value), *getattr(caught.value, "problems", [])]
    assert lines and not any("\n" in line for line in lines)


def test_links_that_lead_in_circles_end_in_one_line(
    collection: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A FIFO is none of the checkpoints, and is not opened."""
    directory, _ = scratch(collection, tmp_path_factory)
    (directory / "d.safetensors").symlink_to("e.safetensors")
    (directory / "e.safetensors").symlink_to("d.safetensors")
    (directory / "f").symlink_to(directory)
    os.mkfifo(directory / "g.pt")
    with pytest.raises(RPGError) as caught:
        register(directory)
    assert "\n" not in str(caught.value)
    found, problems = register(directory, skip_bad=True)
    assert [entry.file for entry in found.entries] == ["a.safetensors", "b.safetensors", "c.pt"]
    refused = {line.rpartition("/")[2].partition(":")[0] for line in problems}
    assert refused == {"d.safetensors", "e.safetensors"}
