"""A task family of one's own, as docs/families.md has it: from training to the report, and a search."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rpg.collection.collection import Collection
from rpg.generator.generator import Generator

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
OWN = ROOT / "configs" / "own_checkpoints.yaml"
SETTINGS = (
    "generator.condition.kind=vector",
    "shard.token_size=49",
    "generator.recurrent.width=64",
    "generator.denoiser.width=64",
    "train.steps=40",
    "train.warmup_steps=5",
    "train.validate_every=20",
    "generator.sampling.steps=1",
    "refine.steps=60",
    "refine.warmup_steps=5",
    "refine.learning_rate=2e-3",
    "refine.states=4",
    "refine.validate_every=30",
    "refine.save_every=30",
    "collect.backbone_epochs=5",
    "collect.epochs=2",
    "collect.checkpoints_per_task=2",
    "generate.models_per_task=2",
    "generate.seen_tasks=3",
    "ray.num_cpus=2",
)


@pytest.fixture(scope="module")
def family_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The complete example of the docs."""
    text = (ROOT / "docs" / "families.md").read_text()
    [code] = [
        block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Sines" in block
    ]
    assert len(code.splitlines()) < 60
    path = tmp_path_factory.mktemp("tasks") / "sines.py"
    path.write_text(code)
    return path


@pytest.fixture(scope="module")
def finished(family_file, run_job, tmp_path_factory):
    output = tmp_path_factory.mktemp("own") / "run"
    arguments = [OWN, f"tasks={family_file}:Sines", *SETTINGS, f"output={output}"]
    result = run_job("pipeline", arguments)
    assert result.returncode == 0, result.stderr
    return output, arguments, result.stdout + result.stderr


def test_the_report_has_the_familys_own_metric(finished, family_file):
    output, _, printed = finished
    report = json.loads((output / "report.json").read_text())
    assert report["metric"] == {"name": "mse", "higher_is_better": False, "unit": ""}
    assert report["left_out"] == []
    assert {row["task"] for row in report["per_task"]} >= {"sin(1.10256x)", "sin(1.92308x)"}
    job = json.loads((output / "generated" / "job.json").read_text())
    spec = importlib.util.spec_from_file_location("sines_again", family_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    errors = []
    for model in job["models"]:
        network = module.Sines().build_network()
        network.load_state_dict(load_file(output / "generated" / model["file"]), strict=True)
        inputs = torch.linspace(-2, 2, 200)[1::2, None]
        with torch.no_grad():
            error = (network(inputs) - torch.sin(model["condition"][0] * inputs)).square().mean()
        errors += [error.item()] * (model["split"] == "unseen")
    assert report["score"]["generated_unseen"]["mean"] == pytest.approx(sum(errors) / len(errors))
    assert report["score"]["generated_unseen"]["n"] == len(errors) == 10
    assert {"ridge_1", "nearest_task", "centre"} <= set(report["score"]["baselines"])
    assert "majority" not in report["score"]["baselines"]
    collection = json.loads((output / "collection" / "collection.json").read_text())
    best = {}
    for entry in sorted(collection["entries"], key=lambda entry: -entry["metrics"]["validation_mse"]):
        if entry["split"] == "heldout":
            best[entry["condition"][0]] = entry["file"]
    scores = []
    for a, file in best.items():
        network = module.Sines().build_network()
        network.load_state_dict(load_file(output / "collection" / file), strict=True)
        with torch.no_grad():
            scores.append((network(inputs) - torch.sin(a * inputs)).square().mean().item())
    assert report["score"]["baselines"]["best_original"]["mean"] == pytest.approx(sum(scores) / len(scores))
    assert "validation mse" in printed
    assert "mse on held-out data (lower is better)" in printed


def test_the_generator_with_the_lowest_error_is_kept(finished):
    output, _, _ = finished
    history = json.loads((output / "generator" / "history.json").read_text())
    scores = [row["validation_score"] for row in history if "validation_score" in row]
    assert len(scores) == 2
    assert min(scores) > 0


def test_refining_makes_better_networks_and_leaves_the_fitted_generator(finished):
    output, _, _ = finished
    best = {}
    for directory in ("fitted", "generator"):
        history = json.loads((output / directory / "history.json").read_text())
        best[directory] = min(row["validation_score"] for row in history if "validation_score" in row)
    assert best["generator"] < 0.7 * best["fitted"]
    refined, fitted = (Generator.from_pretrained(output / name) for name in ("generator", "fitted"))
    assert (refined.config.condition.states, fitted.config.condition.states) == (4, 0)
    assert refined.config.sampling.steps == 1


def test_two_workers_refine_as_one_does(finished, join_job, tmp_path):
    """Each makes networks for half of the tasks; the gradients are those of all."""
    output, arguments, _ = finished
    copy = tmp_path / "run"
    shutil.copytree(output, copy, ignore=shutil.ignore_patterns(".lock"))
    (copy / "stages" / "refine.json").unlink()
    shutil.rmtree(copy / "refine")
    again = [*arguments[:-1], f"output={copy}", "ray.train_workers=2"]
    result = join_job("refine", again)
    assert result.returncode == 0, result.stderr
    one, two = (Generator.from_pretrained(each / "generator").state_dict() for each in (output, copy))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)


def test_a_family_without_a_loss_is_refused_before_any_work(finished, family_file, run_job, tmp_path):
    _, arguments, _ = finished
    without = tmp_path / "without_loss.py"
    without.write_text(family_file.read_text().replace("def loss(", "def no_loss("))
    result = run_job(
        "pipeline", [arguments[0], f"tasks={without}:Sines", *arguments[2:-1], f"output={tmp_path}/x"]
    )
    assert result.returncode == 2
    [line] = result.stderr.strip().splitlines()
    assert "has no methods batch and loss" in line
    assert "refine.steps=0" in line
    assert not (tmp_path / "x" / "collection").exists()


def test_code_that_has_changed_is_run_again_and_only_where_it_counts(finished, family_file, join_job):
    output, arguments, _ = finished
    again = join_job("pipeline", arguments)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("unchanged, reused") == 6
    changed = family_file.with_name("sines_changed.py")
    changed.write_text(family_file.read_text().replace('{"mse":', '{"extra": 1.0, "mse":'))
    collection = f"collect.directory={output / 'collection'}"
    other = [arguments[0], f"tasks={changed}:Sines", *arguments[2:], collection, "train.validate_every=0"]
    first = join_job("pipeline", other)
    assert first.returncode == 0, first.stderr
    changed.write_text(changed.read_text().replace('"extra": 1.0', '"extra": 2.0'))
    second = join_job("pipeline", other)
    assert second.returncode == 0, second.stderr
    # Networks are refined by the family's loss, which may have changed.
    assert second.stderr.count("unchanged, reused") == 3
    report = json.loads((output / "report.json").read_text())
    assert report["metrics"]["extra"]["generated"]["mean"] == 2.0
    assert report["metric"]["name"] == "mse"


def test_a_search_ranks_by_the_lowest_error(family_file, finished, join_job, tmp_path):
    output, _, _ = finished
    space = "tune.space={generator.denoiser.width: [16, 64]}"
    result = join_job(
        "tune",
        [
            OWN,
            f"tasks={family_file}:Sines",
            *SETTINGS,
            f"collect.directory={output / 'collection'}",
            f"output={tmp_path / 'search'}",
            space,
            "tune.trials=2",
            "tune.reduction=2",
        ],
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "search" / "tune" / "table.json").read_text())
    whole = [row["score"] for row in rows if row["share_of_budget"] == 1]
    assert whole == sorted(whole)
    assert whole


def test_a_search_says_why_networks_could_not_be_measured(family_file, finished, join_job, tmp_path):
    output, _, _ = finished
    # The command fails after so many networks.
    counter = tmp_path / "counted"
    script = tmp_path / "test.py"
    script.write_text(
        "import sys\n"
        f"with open({str(counter)!r}, 'a+') as file:\n"
        "    file.write('x')\n"
        "    file.seek(0)\n"
        "    if len(file.read()) > int(sys.argv[1]):\n"
        "        sys.exit('no luck')\n"
        "print(0.5)\n"
    )
    for measured, name in ((0, "none"), (1, "some")):
        counter.unlink(missing_ok=True)
        arguments = [
            OWN, *SETTINGS, "tune.space={generator.denoiser.width: [16]}", "tune.trials=1",
            "tune.reduction=2", "refine.steps=0",
            f"collect.directory={output / 'collection'}", f"output={tmp_path / name}",
            "train.validation_models=1", f"evaluate.command=python {script} {measured * _in_a_round(output)} "
            "{checkpoint}",
        ]  # fmt: skip
        result = join_job("tune", arguments)
        if measured:
            assert result.returncode == 0, result.stderr
            [row] = json.loads((tmp_path / name / "tune" / "table.json").read_text())
            assert (row["score"], row["share_of_budget"]) == (0.5, 0.25)
            assert re.search(r"could not be measured: .*exit status 1: no luck", row["failure"])
            assert "tune: trial 0: networks could not be measured: " in result.stderr + result.stdout
        else:
            assert result.returncode == 2
            assert "tune: all trials failed, one of them with: " in result.stderr
            assert "exit status 1: no luck" in result.stderr


def _in_a_round(output: Path) -> int:
    tasks = Collection.load(output / "collection").tasks("validation")
    return len(tasks)


@pytest.mark.parametrize(
    ("tasks", "parts"),
    [
        ("nowhere.py:Sines", ["tasks: ", "nowhere.py"]),
        ("digit", ["tasks: expected cifar10, ", ", digits, a network as ", "got 'digit'"]),
        ("", ["tasks: expected a task family to train networks for"]),
        (f"{ROOT / 'tests' / 'tasks' / 'my_tasks.py'}:Minimal", ["trains no networks", "fine_tune"]),
    ],
)
def test_a_family_that_cannot_train_is_refused_before_ray_starts(call_job, tmp_path, tasks, parts):
    result = call_job("pipeline", [OWN, f"tasks='{tasks}'", *SETTINGS, f"output={tmp_path / 'run'}"])
    assert result.returncode == 2
    [line] = result.stderr.strip().splitlines()
    assert all(part in line for part in parts), line


def test_a_family_trains_networks_that_a_command_measures_later(join_job, family_file, tmp_path):
    arguments = [OWN, f"tasks={family_file}:Sines", "evaluate.command=false {checkpoint}", *SETTINGS]
    result = join_job("collect", [*arguments, f"output={tmp_path / 'run'}"])
    assert result.returncode == 0, result.stderr
    entries = Collection.load(tmp_path / "run" / "collection").entries
    assert all("validation_mse" in entry.metrics for entry in entries)


def test_a_family_whose_training_fails_is_told_in_one_line(join_job, family_file, tmp_path):
    broken = family_file.with_name("broken_sines.py")
    broken.write_text(family_file.read_text().replace("trained = []", "trained = [][0]"))
    result = join_job("collect", [OWN, f"tasks={broken}:Sines", *SETTINGS, f"output={tmp_path / 'run'}"])
    assert result.returncode == 2
    line = result.stderr.strip().splitlines()[-1]
    assert "Sines: fine_tune: IndexError: list index out of range (broken_sines.py, line " in line
    assert not (tmp_path / "run" / "collection").exists()
