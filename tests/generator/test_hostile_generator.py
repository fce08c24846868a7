"""Whatever was done to the files of a generator, loading it ends in one line or goes well."""

import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rpg.collection.companions import Companions
from rpg.collection.layout import Layout
from rpg.config import RecurrentKind
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from tests.mutations import KINDS, LINKED_DIRECTORY, SECRET, SECRET_VARIABLE, Mutation, mutations_of

FILES = (
    "config.yaml", "layout.json", "centre.safetensors", "generator.safetensors",
    "companions/adapter_config.json", "README.md",
)  # fmt: skip
READ = FILES[:-1]


@pytest.fixture(scope="module")
def saved(
    make_generator: Callable[..., Generator],
    make_layout: Callable[..., Layout],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    companions = Companions({"adapter_config.json": b'{"peft_type": "LORA"}'})
    layout = make_layout(16).with_companions(companions)
    directory = tmp_path_factory.mktemp("generators") / "whole"
    make_generator(layout, recurrent=RecurrentKind.lstm).save_pretrained(directory)
    return directory


def scratch(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of the generator, and a directory outside of it."""
    place = tmp_path_factory.mktemp("hostile")
    (place / "outside").mkdir()
    shutil.copytree(saved, place / "generator")
    return place / "generator", place / "outside"


def line_of(directory: Path) -> str | None:
    """The line that loading ends in, if it does not go well."""
    try:
        Generator.from_pretrained(directory)
    except RPGError as error:
        return str(error)
    return None


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_ends_in_one_line(
    saved: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    data: st.DataObject,
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    directory, outside = scratch(saved, tmp_path_factory)
    name = data.draw(st.sampled_from(FILES))
    mutation: Mutation = data.draw(mutations_of(name))
    mutation.apply(directory / name, outside)
    before = sorted(outside.iterdir()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    said = line_of(directory)
    assert time.monotonic() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before[1] < 1_500_000, "kilobytes"
    assert sorted(outside.iterdir()) == before[0]
    if said is not None:
        assert "\n" not in said and SECRET not in said
        assert str(directory) in said
    if mutation.is_link and name in READ:
        assert said is not None and "is a link" in said


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("mutation", KINDS, ids=repr)
def test_every_kind_of_file_in_the_place_of_every_file(
    saved: Path, tmp_path_factory: pytest.TempPathFactory, name: str, mutation: Mutation
) -> None:
    directory, outside = scratch(saved, tmp_path_factory)
    mutation.apply(directory / name, outside)
    said = line_of(directory)
    assert said is not None and str(directory) in said and "\n" not in said


def test_a_directory_of_companions_that_is_a_link_is_refused(
    saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory, outside = scratch(saved, tmp_path_factory)
    LINKED_DIRECTORY.apply(directory / "companions/adapter_config.json", outside)
    said = line_of(directory)
    assert said is not None and said.endswith("/companions: is a link; expected a directory")


def test_the_directory_itself_may_be_a_link(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved)
    assert Generator.from_pretrained(tmp_path / "link").digest() == Generator.from_pretrained(saved).digest()


def test_an_encoder_that_is_a_link_is_refused(describing: Generator, tmp_path: Path) -> None:
    describing.save_pretrained(tmp_path / "generator")
    Generator.from_pretrained(tmp_path / "generator")
    weights = tmp_path / "generator" / "encoder" / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    said = line_of(tmp_path / "generator")
    assert said is not None and said.endswith("encoder/model.safetensors: is a link; expected a regular file")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            f"  encoder: ${{oc.env:{SECRET_VARIABLE}}}",
            "condition.encoder: expected a plain value, got one that",
        ),
        ("  encoder: ${recurrent.kind}", "condition.encoder: expected a plain value, got one that"),
        ("  encoder: ${oc.decode:'[1]'}", "condition.encoder: expected a plain value, got one that"),
    ],
)
def test_a_generators_configuration_stands_for_itself(
    saved: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    message: str,
) -> None:
    monkeypatch.setenv(SECRET_VARIABLE, SECRET)
    directory, _ = scratch(saved, tmp_path_factory)
    config = directory / "config.yaml"
    text = config.read_text()
    assert "  encoder: ''" in text
    config.write_text(text.replace("  encoder: ''", line))
    said = line_of(directory)
    assert said is not None and message in said and SECRET not in said
