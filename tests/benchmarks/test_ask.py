"""The measurement of the generator that is asked in words, with tiny parts, against plain figures."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.ask import Measurer, card
from rpg.encoders import open_encoder
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.generate import generate_models
from rpg.tasks.cifar10_images import cifar10_images
from rpg.tasks.cifar10_net import Cifar10Net, normalised
from rpg.words.properties import published
from rpg.words.sentences import SentenceUnderstanding
from tests.cifar10_files import write_cifar10
from tests.words_models import CAT_OR_DOG, DOG

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cifar10")
    write_cifar10(directory)
    return directory


def test_accuracies_are_those_of_the_networks(
    asked_generator: Path, words_model: Path, words_package: Path, images: Path, tmp_path: Path
) -> None:
    understanding = open_encoder(words_model)
    assert isinstance(understanding, SentenceUnderstanding)
    generator = Generator.from_pretrained(asked_generator)
    measurer = Measurer(generator, None, str(images), 2, seed=3)
    row = measurer.row("any dog", CAT_OR_DOG, understanding.understand("any dog"))
    assert row.right_bits == pytest.approx(0.9) and row.trained is None

    test = cifar10_images(str(images), "test")
    expected = torch.tensor(CAT_OR_DOG)[test.classes] > 0
    for found, bits in ((row.asked, DOG), (row.by_bits, CAT_OR_DOG)):
        right = []
        condition, out = list(map(float, bits)), tmp_path / str(bits)
        for path in generate_models(generator, [condition], 2, 3, out, generator.config.sampling):
            network = Cifar10Net().eval()
            network.load_state_dict(load_file(str(path)))
            with torch.no_grad():
                right.append(((network(normalised(test.pixels))[:, 0] > 0) == expected).float().mean())
        assert found == pytest.approx(float(torch.stack(right).mean()), abs=1e-6)


def test_a_generator_that_is_too_large_gets_no_card(
    asked_generator: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = card(asked_generator, "# Generator of neural networks\n")
    assert Generator.from_pretrained(asked_generator).digest() in text
    assert "| `encoder/head.safetensors` |" in text
    monkeypatch.setattr("benchmarks.ask.MOST_BYTES", 1000)
    with pytest.raises(RPGError, match="expected at most 1,000"):
        card(asked_generator, "")


@pytest.mark.slow
def test_the_command_prints_its_tables(
    asked_generator: Path, words_model: Path, words_package: Path, images: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(words_package)])}
    command = [
        sys.executable, "benchmarks/ask.py", "--images", images, "--generator", asked_generator,
        "--run", tmp_path, "--models", "1", "--description", "any cat",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    understanding = open_encoder(words_model)
    assert isinstance(understanding, SentenceUnderstanding)
    shares = [
        sum(a == b for a, b in zip(understanding.understand(text).bits, bits, strict=True)) / 10
        for text, bits in published()
    ]
    tables = done.stdout.split("\n\n")
    assert "published (21 descriptions)" in tables[0]
    assert f"| right bits | {sum(shares) / 21:.3f} |" in tables[0]
    assert len(re.findall(r"^\| .* \| .* \| \d\.\d\d \|", done.stdout, re.MULTILINE)) == 21
    assert re.search(r"`rpg ask` took \d+\.\d s, and the second time \d+\.\d s\.", done.stdout)
