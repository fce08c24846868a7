"""The main job as a user runs it: what it leaves, what it says, and what it does when run again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rpg.collection.collection import Collection
from rpg.collection.shards import ShardedCollection
from rpg.config import Solver
from rpg.generator.generator import Generator
from rpg.sampling.generate import generate_models
from rpg.tasks.class_subsets import HELD_OUT_TASKS, class_bits
from rpg.tasks.digits import DigitsNet, digits_images

pytestmark = pytest.mark.slow


def test_report_holds_what_is_promised(small_run):
    report = json.loads((small_run.root / "report.json").read_text())
    for group in ("originals", "generated_unseen", "generated_seen"):
        assert set(report["score"][group]) >= {"mean", "min", "max", "n"}
    for baseline in (
        "centre", "nearest_task", "ridge_1", "ridge_2", "ridge_3", "majority", "best_original",
        "ten-class backbone",
    ):  # fmt: skip
        assert 0 < report["score"]["baselines"][baseline]["mean"] <= 1
    assert set(report["timing_seconds"]) == {"collect", "shard", "train", "refine", "generate", "evaluate"}
    assert report["score"]["generated_unseen"]["n"] == 20 * 2
    assert report["score"]["generated_seen"]["n"] == 20 * 2
    assert report["config"]["train"]["steps"] == 60
    assert report["seed"] == 0
    assert report["versions"]["torch"] == torch.__version__.partition("+")[0]


def test_the_page_has_its_figures_and_the_terminal_its_table(small_run):
    page = (small_run.root / "report.html").read_text()
    assert page.count('src="data:image/svg+xml') >= 4
    assert "<table" in page
    assert "generated, unseen tasks" in small_run.printed
    for stage in ("collect", "shard", "train", "refine", "generate", "evaluate"):
        assert f"{stage}: done in" in small_run.printed
    assert "Traceback" not in small_run.printed


def test_reported_accuracy_is_that_of_the_plain_network(small_run):
    """The report's mean, recomputed with the plain PyTorch module from the files alone."""
    report = json.loads((small_run.root / "report.json").read_text())
    job = json.loads((small_run.root / "generated" / "job.json").read_text())
    test = digits_images()["test"]
    accuracies = []
    for model in job["models"]:
        network = DigitsNet()
        network.load_state_dict(load_file(small_run.root / "generated" / model["file"]), strict=True)
        with torch.no_grad():
            answers = network.eval()(test.images)[:, 0] > 0
        right = torch.tensor(model["condition"]).bool()[test.classes]
        if model["split"] == "unseen":
            accuracies.append((answers == right).float().mean().item())
    assert report["score"]["generated_unseen"]["mean"] == pytest.approx(
        sum(accuracies) / len(accuracies), abs=1e-6
    )


def test_held_out_tasks_reach_nothing_that_is_learned_from(small_run):
    held_out = [class_bits(task) for task in HELD_OUT_TASKS]
    shards = ShardedCollection.open(small_run.root / "shards")
    assert shards.conditions is not None
    learned = shards.conditions.tolist()
    assert not [condition for condition in held_out if condition in learned]
    collection = Collection.load(small_run.root / "collection")
    validation = [entry.condition for entry in collection.splits["validation"]]
    assert not [condition for condition in validation if condition in learned]
    job = json.loads((small_run.root / "generated" / "job.json").read_text())
    unseen = [model["condition"] for model in job["models"] if model["split"] == "unseen"]
    assert sorted(map(tuple, unseen)) == sorted(tuple(condition) for condition in held_out * 2)


def test_generated_files_are_those_of_the_library(small_run, tmp_path):
    """What Ray's actors wrote in batches is what one process makes of the same job, byte for byte."""
    generator = Generator.from_pretrained(small_run.root / "generator")
    job = json.loads((small_run.root / "generated" / "job.json").read_text())
    conditions = [model["condition"] for model in job["models"][::2]]
    torch.set_num_threads(1)
    paths = generate_models(generator, conditions, 2, job["seed"], tmp_path, generator.config.sampling)
    for path, model in zip(paths, job["models"], strict=True):
        assert path.read_bytes() == (small_run.root / "generated" / model["file"]).read_bytes()


def test_model_card_has_the_accuracies(small_run):
    card = (small_run.root / "generator" / "README.md").read_text()
    assert "generated, unseen tasks" in card


def test_a_second_run_reuses_stages_whose_inputs_have_not_changed(small_run, join_job, tmp_path):
    report = (small_run.root / "report.json").read_bytes()
    again = join_job("pipeline", small_run.arguments)
    assert again.returncode == 0, again.stderr
    for stage in ("collect", "shard", "train", "refine", "generate", "evaluate"):
        assert f"{stage}: unchanged, reused" in again.stderr
    assert (small_run.root / "report.json").read_bytes() == report

    # Of a copy: other tests compare themselves with the small run.
    shutil.copytree(small_run.root, tmp_path / "copy")
    other = [f"output={tmp_path / 'copy'}", "evaluate.noise_levels=[0.02]"]
    changed = join_job("pipeline", [*small_run.arguments, *other])
    assert changed.returncode == 0, changed.stderr
    assert "generate: unchanged, reused" in changed.stderr
    assert "evaluate: done in" in changed.stderr

    # Sampled otherwise: what the report then tells is what the generator does by default.
    other = [f"output={tmp_path / 'copy'}", "generator.sampling.steps=3", "generator.sampling.solver=ddim"]
    changed = join_job("pipeline", [*small_run.arguments, *other])
    assert changed.returncode == 0, changed.stderr
    assert "train: unchanged, reused" in changed.stderr
    # Networks are refined through the steps by which they are sampled.
    assert "refine: done in" in changed.stderr
    assert "generate: done in" in changed.stderr
    generator = Generator.from_pretrained(tmp_path / "copy" / "generator")
    assert (generator.config.sampling.steps, generator.config.sampling.solver) == (3, Solver.ddim)
    fitted = [Generator.from_pretrained(run / "fitted") for run in (tmp_path / "copy", small_run.root)]
    assert fitted[0].digest() == fitted[1].digest()
