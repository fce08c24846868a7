"""Networks of a task family, by a generator that is asked in words: from collecting to a description."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ray_jobs.collect import COLLECT
from ray_jobs.stage import is_done
from rpg.collection.collection import Collection
from rpg.commands.main import main
from rpg.config import load_config
from rpg.generator.generator import Generator
from rpg.text_encoder import encoder_digest
from tests.words_models import CAT_OR_DOG

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"


@pytest.mark.slow
def test_a_family_is_collected_with_an_encoder(
    join_job: Callable[..., Any],
    small_settings: list[str],
    words_model: Path,
    words_package: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    settings = [
        *small_settings, f"output={output}", f"collect.encoder={words_model}",
        "generator.dtype=float16", "refine.steps=4",
    ]  # fmt: skip
    for stage in ("collect", "shard", "train", "refine"):
        result = join_job(stage, settings)
        assert result.returncode == 0, result.stderr
    digest = encoder_digest(words_model)
    collection = Collection.load(output / "collection")
    assert collection.encoder == digest == encoder_digest(collection.encoder_directory)
    assert collection.entries[0].description is None and collection.condition_width == 10
    assert json.loads((output / "shards" / "shards.json").read_text())["encoder"] == digest

    generator = Generator.from_pretrained(output / "generator")
    assert generator.config.condition.encoder == digest
    stored = load_file(output / "generator" / "generator.safetensors").values()
    assert {tensor.dtype for tensor in stored if tensor.is_floating_point()} == {torch.float16}
    bits = "".join(map(str, CAT_OR_DOG))
    for name, asked in (("words", ["--description", "a cat or a dog"]), ("bits", ["--condition", bits])):
        assert main(["generate", str(output / "generator"), *asked, "--out", str(tmp_path / name)]) == 0
    made = [(tmp_path / name / "model_000000.safetensors").read_bytes() for name in ("words", "bits")]
    assert made[0] == made[1]
    assert "'a cat or a dog': cat" in capsys.readouterr().err

    # Another place of the same encoder changes nothing; none does.
    without = [each for each in settings[1:] if not each.startswith("collect.encoder=")]
    elsewhere = [*without, f"collect.encoder={collection.encoder_directory}"]
    assert is_done(COLLECT, load_config(DIGITS, elsewhere))
    assert not is_done(COLLECT, load_config(DIGITS, without))


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        ("text_encoder", "expected conditions of 10 values, as the tasks have, got 32"),
        ("tmp_path", "config.json: not found; expected a text encoder's configuration"),
    ],
)
def test_an_encoder_that_does_not_fit_is_refused_before_anything_is_made(
    call_job: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    encoder: str,
    words: str,
) -> None:
    monkeypatch.setattr("ray.init", None)
    path = request.getfixturevalue(encoder)
    result = call_job("collect", [DIGITS, f"output={tmp_path / 'run'}", f"collect.encoder={path}"])
    assert result.returncode == 2 and words in result.stderr
    assert not (tmp_path / "run" / "collection").exists()
