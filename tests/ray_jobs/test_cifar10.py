"""The preset `cifar10-binary`, with few and small images, on a CPU: images in, report out."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpg.collection.checkpoint import checkpoint_sha256, write_checkpoint
from rpg.collection.collection import FAMILY, Collection, Entry
from rpg.config import generator_config_from_yaml
from rpg.tasks.cifar10_images import cifar10_images
from rpg.tasks.cifar10_net import Cifar10Net, normalised
from tests.cifar10_files import write_cifar10

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "configs" / "cifar10-binary.yaml"
SMALL = (
    "ray.use_gpu=false",
    "ray.num_cpus=2",
    "collect.checkpoints_per_task=1",
    "collect.heldout_checkpoints_per_task=1",
    "collect.backbone_epochs=2",
    "collect.epochs=2",
    "collect.batch_size=4",
    "collect.models_per_batch=64",
    "generator.denoiser.width=32",
    "generator.denoiser.depth=1",
    "generator.recurrent.width=64",
    "generator.sampling.steps=2",
    "generator.sampling.token_batch=512",
    "train.steps=4",
    "train.checkpoints_per_step=2",
    "train.validate_every=4",
    "train.tokens_per_checkpoint=4",
    "refine.steps=2",
    "refine.tasks_per_step=2",
    "refine.networks_per_task=2",
    "refine.samples_per_step=4",
    "refine.validate_every=2",
    "generate.models_per_task=1",
    "generate.seen_tasks=1",
    "evaluate.noise_levels=[0.02]",
)


def test_from_images_to_report(run_job, tmp_path):
    images = tmp_path / "images"
    write_cifar10(images, train=12, test=20)
    run = tmp_path / "run"
    # Relative, as a user would write it: Ray's workers are elsewhere.
    relative = os.path.relpath(images, ROOT)
    settings = [PRESET, *SMALL, f"collect.images={relative}", f"output={run}"]
    result = run_job("pipeline", settings, timeout=550)
    assert result.returncode == 0, result.stderr
    report = json.loads((run / "report.json").read_text())
    test = cifar10_images(str(images), "test")

    def accuracy(path: Path, condition: list[float]) -> float:
        network = Cifar10Net().eval()
        network.load_state_dict(load_file(path), strict=True)
        with torch.no_grad():
            answers = network(normalised(test.pixels))[:, 0] > 0
        right = torch.tensor(condition).bool()[test.classes]
        return (answers == right).float().mean().item()

    # The report's means, recomputed with the plain PyTorch module from the files alone.
    job = json.loads((run / "generated" / "job.json").read_text())
    generated = [
        accuracy(run / "generated" / model["file"], model["condition"])
        for model in job["models"]
        if model["split"] == "unseen"
    ]
    assert len(generated) == 20
    mean = sum(generated) / len(generated)
    assert report["score"]["generated_unseen"]["mean"] == pytest.approx(mean, abs=1e-6)
    collection = json.loads((run / "collection" / "collection.json").read_text())
    originals = [
        accuracy(run / "collection" / entry["file"], entry["condition"])
        for entry in collection["entries"]
        if entry["split"] == "heldout"
    ]
    assert len(collection["entries"]) == 1022
    # Copies share the order of the images: one copy is one permutation state, and the preset asks for all.
    assert {entry["state"] for entry in collection["entries"]} == {0}
    for directory, states in (("fitted", 1), ("generator", 32)):
        assert generator_config_from_yaml(run / directory / "config.yaml").condition.states == states
    assert len(originals) == 20
    mean = sum(originals) / len(originals)
    assert report["score"]["originals"]["mean"] == pytest.approx(mean, abs=1e-6)

    first = run / "generated" / job["models"][0]["file"]
    before = load_file(first)
    result = run_job("generate", [*settings, "generate.recompute_batchnorm=true"])
    assert result.returncode == 0, result.stderr
    after = load_file(first)
    running = {name for name in before if name.rpartition(".")[2].startswith(("running", "num_batches"))}
    assert {name for name in before if not torch.equal(before[name], after[name])} == running
    network = Cifar10Net().eval()
    network.load_state_dict(after, strict=True)
    train = normalised(cifar10_images(str(images), "train").pixels)
    inputs: list[torch.Tensor] = []
    norm = next(module for module in network.modules() if isinstance(module, torch.nn.BatchNorm2d))
    norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        network(train)
    # The batches are drawn from all training images, so their statistics are about those of all.
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, inputs[0].mean((0, 2, 3)), atol=0.05, rtol=0.05)
    torch.testing.assert_close(norm.running_var, inputs[0].var((0, 2, 3)), atol=0.05, rtol=0.1)


@pytest.mark.parametrize(("module", "images"), [("collect", ""), ("pipeline", "collect.images=nowhere")])
def test_missing_images_are_refused_before_any_work(run_job, tmp_path, module, images):
    settings = [PRESET, *SMALL, f"output={tmp_path / 'run'}", *([images] if images else [])]
    result = run_job(module, settings)
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1
    assert "Traceback" not in result.stderr
    assert "collect.images" in errors[0]
    assert not (tmp_path / "run" / "collection").exists()


def test_images_that_only_evaluation_needs_are_missed_before_training(call_job, tmp_path):
    for name in ("a", "b"):
        write_checkpoint(tmp_path / name, Cifar10Net().state_dict(), {})
    entries = [Entry(name, checkpoint_sha256(tmp_path / name), [0.0, 1.0] * 5) for name in ("a", "b")]
    Collection(tmp_path, {FAMILY: "cifar10"}, entries).save()
    given = [f"collect.directory={tmp_path}", "train.validate_every=0"]
    result = call_job("pipeline", [PRESET, *SMALL, *given, f"output={tmp_path / 'run'}"])
    assert result.returncode == 2, result.stderr
    assert "error: collect.images: expected the directory or URI" in result.stderr
    assert not (tmp_path / "run" / "shards").exists()


def test_networks_without_statistics_have_none_to_recompute(call_job, tmp_path):
    digits = ["tasks=digits", "generate.recompute_batchnorm=true", f"output={tmp_path / 'run'}"]
    result = call_job("pipeline", [ROOT / "configs" / "digits.yaml", *digits])
    assert result.returncode == 2, result.stderr
    assert "generate.recompute_batchnorm: 'digits' has no method batch, or networks without" in result.stderr
    assert not (tmp_path / "run" / "collection").exists()


def test_a_missing_gpu_is_refused(run_job, tmp_path):
    write_cifar10(tmp_path, train=12, test=20)
    settings = [
        PRESET,
        *SMALL,
        "ray.use_gpu=true",
        f"collect.images={tmp_path}",
        f"output={tmp_path / 'run'}",
    ]
    result = run_job("collect", settings, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert result.returncode == 2
    assert "ray.use_gpu: collecting asks for 1 GPU" in result.stderr
