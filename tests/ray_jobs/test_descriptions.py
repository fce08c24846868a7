"""Descriptions all the way: register, shard, train a little, generate by description."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ray_jobs.train import run as train
from rpg.collection.collection import Collection
from rpg.commands.main import main
from rpg.config import load_config
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.text_encoder import TextEncoder, encoder_digest

pytestmark = pytest.mark.slow

OWN = Path(__file__).parents[2] / "configs" / "own_checkpoints.yaml"
TINY = (
    "train.steps=4",
    "train.save_every=2",
    "train.warmup_steps=2",
    "shard.token_size=64",
    "generator.recurrent.width=64",
    "generator.denoiser.width=32",
    "generator.condition.kind=vector",
    "generate.models_per_task=1",
    "ray.num_cpus=2",
)
TEXTS = [
    "is it a cat?",
    "is it a dog?",
    "is it one or two?",
    "is it a truck?",
    "any of three cats",
    "two dogs",
]


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Six checkpoints, and what each was trained for in `texts.json`."""
    torch.manual_seed(0)
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    for i in range(len(TEXTS)):
        torch.save(nn.Linear(12, 8).state_dict(), directory / f"{i}.pt")
    (tmp_path / "texts.json").write_text(json.dumps({f"{i}.pt": text for i, text in enumerate(TEXTS)}))
    return directory


def test_from_register_to_a_network_by_description(
    join_job: Callable[..., Any], checkpoints: Path, text_encoder: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "encoder of mine"
    shutil.copytree(text_encoder, encoder)
    described = ["--descriptions", str(tmp_path / "texts.json"), "--encoder", str(encoder)]
    assert main(["register", str(checkpoints), *described]) == 0
    # From here on nothing names it.
    shutil.rmtree(encoder)
    output = tmp_path / "run"
    # The command is told the description that a network was made for.
    command = "evaluate.command=python -c 'import sys; print(len(sys.argv[2]))' {checkpoint} {condition}"
    settings = [OWN, *TINY, f"collect.directory={checkpoints}", f"output={output}", command]
    result = join_job("pipeline", settings)
    assert result.returncode == 0, result.stderr
    report = json.loads((output / "report.json").read_text())
    texts = set(json.loads((tmp_path / "texts.json").read_text()).values())
    assert {row["task"] for row in report["per_task"]} <= texts
    assert all(row["generated"]["mean"] == len(row["task"]) for row in report["per_task"])

    digest = encoder_digest(text_encoder)
    assert json.loads((output / "shards" / "shards.json").read_text())["encoder"] == digest
    assert not list((output / "train").rglob("tokenizer.json")), "steps do not each hold the encoder"
    # Nor does the collection have to stay where it was.
    Collection.load(checkpoints).encoder_directory.rename(tmp_path / "away")
    generator = Generator.from_pretrained(output / "generator")
    assert generator.config.condition.encoder == digest
    assert generator.config.condition.size == 32

    text = "is it a truck, or one of two cats?"
    embedding = TextEncoder(text_encoder).encode(text)
    asked = {"words": ["--description", text], "numbers": [f"--condition={','.join(map(repr, embedding))}"]}
    for name, arguments in asked.items():
        command = ["generate", str(output / "generator"), *arguments, "--number", "2", "--out"]
        assert main([*command, str(tmp_path / name)]) == 0
    for i in range(2):
        made = [(tmp_path / name / f"model_{i:06d}.safetensors").read_bytes() for name in asked]
        assert made[0] == made[1]

    # It is missed before anything is trained: here there is no Ray.
    with pytest.raises(RPGError, match=r"checkpoints/encoder/config\.json: not found"):
        train(load_config(OWN, [*map(str, settings[1:])]))
