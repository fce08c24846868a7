"""`benchmarks/cifar10_resnet18.py`: its numbers against sums done by hand, and calling it again.

A smaller network stands for the ResNet-18, and the library's own functions for the pipeline's stages, which
`tests/ray_jobs/test_own_checkpoints.py` runs on such a collection.
"""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rpg.collection.collection import Collection
from rpg.collection.manifest import write_manifest
from rpg.collection.shard_file import write_shard
from rpg.collection.shards import ShardedCollection
from rpg.collection.statistics import LayoutStatistics
from rpg.config import TokenDtype
from rpg.sampling.generate import generate_models
from rpg.storage.files import write_json
from rpg.tasks.cifar10_images import cifar10_images
from rpg.training.fit import fit, new_trainer
from tests.cifar10_files import write_cifar10

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEST_IMAGES = 40


class SmallNet(nn.Module):
    """A convolution with BatchNorm, and ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.conv(images)).relu().mean((2, 3)))
        return logits


def stages(session: Any) -> dict[str, Any]:
    """What the pipeline's stages leave behind."""
    config, collection = session.config, Collection.load(session.collection)
    networks = [(entry.file, collection.read(entry)) for entry in collection.entries]
    statistics = LayoutStatistics(networks[0][1])
    for _, network in networks:
        statistics.update(network)
    layout = statistics.layout(64, config.shard.normalisation)
    directory = session.run / "shards"
    directory.mkdir(parents=True)
    shard = write_shard(directory / "shard.arrow", layout, networks, TokenDtype.float32)
    write_manifest(directory, layout, [shard], collection.entries, TokenDtype.float32)
    shards = ShardedCollection.open(directory)
    trainer = new_trainer(shards, config.generator, config.train, config.seed, session.device)
    fit(trainer, shards, config.seed, lambda progress: None, lambda trainer, progress: None)
    trainer.average.save_pretrained(session.run / "generator")
    files = generate_models(
        trainer.average, None, config.generate.models_per_task, config.seed,
        session.run / "generated", config.generator.sampling,
    )  # fmt: skip
    write_json(session.run / "generated" / "job.json", {"models": [{"file": file.name} for file in files]})
    return {
        "stage_seconds": {"shard": 1.0, "train": 2.0, "generate": 3.0},
        "training_steps": 4, "training_seconds": 1.5, "loss": 0.5, "generator_parameters": 1, "tokens": 1,
    }  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("cifar10_resnet18")
    monkeypatch.setattr(module, "cifar10_resnet18", SmallNet)
    monkeypatch.setattr(module, "fit", stages)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    return module


@pytest.fixture
def call(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`call(*options)` runs the script's `main` on small images."""
    write_cifar10(tmp_path / "images", train=90, test=TEST_IMAGES)

    def main(*options: str) -> None:
        given = ["--tiny", "--images", tmp_path / "images", "--output", tmp_path / "out"]
        arguments = [*given, "--runs", tmp_path / "runs", *options]
        monkeypatch.setattr("sys.argv", ["cifar10_resnet18.py", *map(str, arguments)])
        script.main()

    return main


def by_hand(path: Path, images: Path) -> tuple[set[int], Tensor]:
    """The test images that the network of a file is wrong on, one by one, and its floating weights."""
    test = cifar10_images(str(images), "test")
    state_dict = load_file(path)
    network = SmallNet().eval()
    network.load_state_dict(state_dict, strict=True)
    wrong = set()
    for i, (image, label) in enumerate(zip(test.pixels, test.classes, strict=True)):
        scaled = (image / 255.0 - torch.tensor([0.4914, 0.4822, 0.4465])) / torch.tensor(
            [0.2470, 0.2435, 0.2616]
        )
        with torch.no_grad():
            if int(network(scaled.movedim(2, 0)[None]).argmax()) != int(label):
                wrong.add(i)
    weights = [value.flatten() for value in state_dict.values() if value.is_floating_point()]
    return wrong, torch.cat(weights)


def test_numbers_are_those_of_sums_by_hand(call: Any, tmp_path: Path) -> None:
    call()
    runs, images = tmp_path / "runs", tmp_path / "images"
    files = [runs / "collection" / entry.file for entry in Collection.load(runs / "collection").entries]
    originals = [by_hand(file, images) for file in files]
    generated = [by_hand(file, images) for file in sorted((runs / "run" / "generated").glob("*.safetensors"))]
    assert (len(originals), len(generated)) == (5, 2)
    assert all(not a.equal(b) for i, (_, a) in enumerate(originals) for _, b in originals[:i])

    found = json.loads((tmp_path / "out" / "results.json").read_text())["evaluation"]
    for name, networks in (("originals", originals), ("generated", generated)):
        expected = [1 - len(wrong) / TEST_IMAGES for wrong, _ in networks]
        assert found["accuracy"][name] == pytest.approx(expected)

    def iou(a: set[int], b: set[int]) -> float:
        return len(a & b) / len(a | b)

    largest = [max(iou(wrong, other) for other, _ in originals) for wrong, _ in generated]
    assert found["largest_similarity"]["generated"] == pytest.approx(largest)
    others = [
        max(iou(wrong, other) for j, (other, _) in enumerate(originals) if j != i)
        for i, (wrong, _) in enumerate(originals)
    ]
    assert found["largest_similarity"]["originals"] == pytest.approx(others)

    # In the units of the tokens: by tensor, the deviation of all originals from their mean is 1.
    layout = ShardedCollection.open(runs / "run" / "shards").layout
    mask = layout.mask()
    rows = torch.stack([layout.encode(load_file(file)).tokens[mask] for file in files]).double()
    unit = (rows - rows.mean(0)).square().sum(1).mean().sqrt()
    to_centre = [float(row.norm() / unit) for row in rows]
    assert found["distance"]["originals"]["to_centre"] == pytest.approx(to_centre, rel=1e-4)
    nearest = min(float((rows[0] - row).norm() / unit) for row in rows[1:])
    assert found["distance"]["originals"]["to_nearest_original"] == pytest.approx([nearest], rel=1e-4)
    assert found["distance"]["centre"]["to_centre"] == [0.0]
    for form in ("png", "svg"):
        assert (tmp_path / "out" / f"cifar10_resnet18.{form}").stat().st_size > 10_000


def test_a_later_call_goes_on_with_what_is_missing(
    call: Any, script: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as end:
        call("--seconds", "0")
    assert end.value.code == 3

    def killed(session: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            call()
    monkeypatch.setattr(script, "collect", killed)
    call()
    printed = capsys.readouterr().out
    assert "| generated | 2 |" in printed
    # All is there: it only prints again.
    call("--seconds", "0")
    assert capsys.readouterr().out == printed
