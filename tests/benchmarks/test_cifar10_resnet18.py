"""`benchmarks/cifar10_resnet18.py --tiny`: from images to figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rpg.collection.collection import Collection
from rpg.tasks.cifar10_images import cifar10_images
from rpg.tasks.cifar10_resnet18 import cifar10_resnet18
from tests.cifar10_files import write_cifar10

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
IMAGES = 20


def call(images: Path, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, str(ROOT / "benchmarks" / "cifar10_resnet18.py"), "--tiny", "--images", str(images),
        "--output", str(directory / "results"), "--runs", str(directory / "runs"), *options,
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_from_images_to_figures(tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_cifar10(images, train=90, test=IMAGES)
    nothing_begun = call(images, tmp_path, "--seconds", "0")
    assert nothing_begun.returncode == 3, nothing_begun.stderr
    finished = call(images, tmp_path)
    assert finished.returncode == 0, finished.stderr

    runs, output = tmp_path / "runs", tmp_path / "results"
    collection = Collection.load(runs / "collection")
    originals = [runs / "collection" / entry.file for entry in collection.entries]
    generated = sorted((runs / "run" / "generated").glob("*.safetensors"))
    assert (len(originals), len(generated)) == (5, 2)
    test = cifar10_images(str(images), "test")

    def wrong(path: Path) -> set[int]:
        """The images that the network of a file is wrong on, one by one."""
        network = cifar10_resnet18().eval()
        network.load_state_dict(load_file(path), strict=True)
        with torch.no_grad():
            scaled = (test.pixels / 255.0 - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor(
                [0.2470, 0.2435, 0.2616]
            )
            answers = [int(network(image.movedim(2, 0)[None]).argmax()) for image in scaled]
        return {i for i, answer in enumerate(answers) if answer != int(test.classes[i])}

    found = json.loads((output / "results.json").read_text())["evaluation"]
    of_originals, of_generated = [wrong(path) for path in originals], [wrong(path) for path in generated]
    for name, expected in (("originals", of_originals), ("generated", of_generated)):
        assert found["accuracy"][name] == pytest.approx([1 - len(each) / IMAGES for each in expected])
    largest = [max(len(a & b) / len(a | b) for b in of_originals) for a in of_generated]
    assert found["largest_similarity"]["generated"] == pytest.approx(largest)

    def floating(path: Path) -> np.ndarray:
        tensors = load_file(path)
        return np.concatenate([tensors[name].flatten().double() for name in sorted(tensors)])

    weights = np.stack([floating(path) for path in originals])
    assert len({row.tobytes() for row in weights}) == len(weights)
    for form in ("png", "svg"):
        assert (output / f"cifar10_resnet18.{form}").stat().st_size > 10_000
    assert "| generated | 2 |" in finished.stdout

    # All is there: it only prints again.
    again = call(images, tmp_path, "--seconds", "0")
    assert again.returncode == 0, again.stderr
    assert again.stdout == finished.stdout
