"""A family whose networks come along one training run: from images to the report, its process killed once."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rpg.collection.collection import Collection
from rpg.tasks.cifar10_images import cifar10_images
from rpg.tasks.families import family_of, load_family
from tests.cifar10_files import write_cifar10

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OWN = ROOT / "configs" / "own_checkpoints.yaml"
FAMILY = """
import os
import signal
from pathlib import Path

from rpg.tasks.image_classifiers import ImageClassifier

MARK = Path(__file__).with_name("killed")


class Small(ImageClassifier):
    network = "timm:test_vit"
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}


class Killed(Small):
    def checkpoints(self, config, seed, state):
        for number, got in enumerate(super().checkpoints(config, seed, state)):
            yield got
            if state.exists() and number > 4 and not MARK.exists():
                MARK.touch()
                os.kill(os.getpid(), signal.SIGKILL)


class Broken(Small):
    def checkpoints(self, config, seed, state):
        yield "epoch 1"
        raise ValueError("no such luck")


class Single(Small):
    def checkpoints(self, config, seed, state):
        yield self.build_network().state_dict()
"""
SETTINGS = (
    "collect.checkpoints_per_task=4",
    "collect.backbone_epochs=8",
    "collect.batch_size=9",
    "collect.learning_rate=1e-2",
    "shard.token_size=64",
    "generator.recurrent.width=64",
    "generator.denoiser.width=64",
    "generator.denoiser.depth=1",
    "generator.sampling.steps=2",
    "train.steps=4",
    "train.warmup_steps=1",
    "generate.models_per_task=3",
    "evaluate.noise_levels=[0.02]",
    "ray.num_cpus=2",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("along")
    (directory / "small_family.py").write_text(FAMILY)
    write_cifar10(directory / "images", train=60, test=20)
    return directory


def arguments(directory, family, output):
    return [
        OWN,
        f"tasks={directory}/small_family.py:{family}",
        f"collect.images={directory}/images",
        *SETTINGS,
        f"output={output}",
    ]


def test_from_images_to_the_report_and_a_kill_changes_nothing(run_job, directory):
    result = run_job("pipeline", arguments(directory, "Killed", directory / "run"), timeout=500)
    assert result.returncode == 0, result.stderr
    assert (directory / "killed").exists()
    assert "collect: 4/4 validation accuracy 0" in result.stderr
    run = directory / "run"
    collection = Collection.load(run / "collection")
    assert [entry.file for entry in collection.entries] == [
        f"checkpoint_{i:04d}.safetensors" for i in range(4)
    ]
    assert collection.condition_width is None
    assert not (run / "collection.training").exists()

    # The same networks, from a plain loop over what the family yields in this process.
    images = str(directory / "images")
    name = f"{directory}/small_family.py:Small"
    family = load_family(name, images)
    result = run_job("collect", arguments(directory, "Small", directory / "plain"))
    assert result.returncode == 0, result.stderr
    for entry in collection.entries:
        killed, plain = (load_file(path / "collection" / entry.file) for path in (run, directory / "plain"))
        assert all(killed[tensor].equal(plain[tensor]) for tensor in plain)

    report = json.loads((run / "report.json").read_text())
    test = cifar10_images(images, "test")

    def accuracy(path):
        network = family.build_network().eval()
        network.load_state_dict(load_file(path), strict=True)
        with torch.no_grad():
            return float((network(family.inputs(test.pixels)).argmax(1) == test.classes).double().mean())

    means = {
        "originals": [accuracy(run / "collection" / entry.file) for entry in collection.entries],
        "generated_seen": [accuracy(path) for path in sorted((run / "generated").glob("*.safetensors"))],
    }
    for row, values in means.items():
        assert len(values) >= 3
        assert report["score"][row]["mean"] == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_a_network_by_its_name_learns_from_folders_of_images(join_job, directory, tmp_path):
    test = cifar10_images(str(directory / "images"), "test")
    for part in ("train", "test"):
        images = cifar10_images(str(directory / "images"), part)
        for number, (pixels, label) in enumerate(zip(images.pixels, images.classes, strict=True)):
            folder = tmp_path / "images" / part / f"class {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(folder / f"{number:02d}.png")
    given = [OWN, "tasks=timm:test_vit", f"collect.images={tmp_path}/images", *SETTINGS]
    result = join_job("collect", [*given, "collect.backbone_epochs=1", f"output={tmp_path}/run"])
    assert result.returncode == 0, result.stderr
    collection = Collection.load(tmp_path / "run" / "collection")
    assert len(collection.entries) == 4
    # The collection's own file says which network it is.
    family = load_family(family_of(collection), str(tmp_path / "images"))
    assert sorted(family.labels(None, "test").tolist()) == sorted(test.classes.tolist())
    for entry in collection.entries:
        family.build_network().load_state_dict(load_file(collection.root / entry.file), strict=True)


@pytest.mark.parametrize(
    ("family", "message"),
    [("Broken", "checkpoints: ValueError: no such luck (small_family.py, line 28)"),
     ("Single", "checkpoints: expected at least 2 networks, got 1")],
)  # fmt: skip
def test_a_family_that_fails_is_told_in_one_line(join_job, directory, tmp_path, family, message):
    result = join_job("collect", arguments(directory, family, tmp_path / "run"))
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run" / "collection").exists()
