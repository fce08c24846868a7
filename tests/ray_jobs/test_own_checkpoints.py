"""Checkpoints of one's own, as the README has it: register, run the pipeline, generate, load."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

pytestmark = pytest.mark.slow

OWN = Path(__file__).parents[2] / "configs" / "own_checkpoints.yaml"
TINY = (
    "train.steps=6",
    "train.save_every=6",
    "train.warmup_steps=2",
    "shard.token_size=64",
    "generator.recurrent.width=64",
    "generator.denoiser.width=32",
    "generate.models_per_task=3",
    "ray.num_cpus=2",
)


class TiedNet(nn.Module):
    """Tied embeddings, a BatchNorm and a scalar: what checkpoints of real networks hold."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.norm = nn.BatchNorm1d(12)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.norm(self.embedding(words))) * self.scale
        return logits


@pytest.fixture
def checkpoints(tmp_path):
    """Six checkpoints along a short training, named as upstream names them."""
    torch.manual_seed(0)
    network, directory = TiedNet(), tmp_path / "my checkpoints"
    directory.mkdir()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    for i, class_number in enumerate((314, 482, 589, 197, 462, 111)):
        for _ in range(3):
            words = torch.randint(20, (16,))
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(words), words).backward()
            optimiser.step()
        torch.save(network.state_dict(), directory / f"{i:04d}_acc0.9{i}13_class{class_number:04d}_tied.pth")
    return directory


def rpg(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("rpg")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("kind", ["vector", "permutation"])
def test_register_shard_train_generate_load(join_job, checkpoints, tmp_path, kind):
    assert rpg("register", checkpoints).returncode == 0
    output = tmp_path / "own run"
    settings = [OWN, *TINY, f"collect.directory={checkpoints}", f"output={output}"]
    result = join_job("pipeline", [*settings, f"generator.condition.kind={kind}"])
    assert result.returncode == 0, result.stderr
    assert "evaluate: left out: scores: " in result.stderr
    assert "does not say which task family" in result.stderr
    report = json.loads((output / "report.json").read_text())
    assert report["metric"] is None
    assert report["distance"]["generated_seen"]["n"] == (18 if kind == "vector" else 3)
    assert report["distance"]["among_generated"]["n"] > 0
    assert "Distance to the nearest training checkpoint" in result.stdout

    asked = ["--condition", "0100111010"] if kind == "vector" else []
    made = rpg(
        "generate", output / "generator", *asked, "--number", 2, "--seed", 1, "--out", tmp_path / "new"
    )
    assert made.returncode == 0, made.stderr
    for file in [
        *sorted((tmp_path / "new").glob("*.safetensors")),
        *(output / "generated").glob("*.safetensors"),
    ]:
        # The tie is known to the layout: both names hold the same values in the file itself.
        content = load_file(file)
        assert content["head.weight"].equal(content["embedding.weight"])
        network = TiedNet()
        network.load_state_dict(content, strict=True)
        assert network.eval()(torch.arange(20)).isfinite().all()
    assert rpg("inspect", output / "generator").returncode == 0
    assert rpg("inspect", output / "shards", "--verify").returncode == 0

    if kind == "vector":
        refused = rpg("generate", output / "generator", "--condition", "01", "--out", tmp_path / "none")
        assert refused.returncode == 2
        assert "expected 10 values, got 2" in refused.stderr


TEST = """
import json, sys, torch
from safetensors.torch import load_file
state = load_file(sys.argv[1])
if sys.argv[2] == "test" and "model_000001" in sys.argv[1]:
    sys.exit("this one is odd")
print("norm of the embedding")
print(json.dumps({"scale": float(state["scale"]), "norm": float(state["embedding.weight"].norm())}))
"""


def test_a_command_measures_networks_without_conditions(join_job, checkpoints, tmp_path):
    assert rpg("register", checkpoints).returncode == 0
    (tmp_path / "test.py").write_text(TEST)
    output = tmp_path / "run"
    norm = {
        file.name: float(torch.load(file)["embedding.weight"].norm()) for file in checkpoints.glob("*.pth")
    }
    # What was recorded says that the largest norm was the smallest on validation data.
    recorded = {name: {"validation_norm": -value} for name, value in norm.items()}
    (tmp_path / "metrics.json").write_text(json.dumps(recorded))
    assert rpg("register", checkpoints, "--metrics", tmp_path / "metrics.json").returncode == 0
    # The command runs where `evaluate.directory` says, and Ray's workers elsewhere.
    command = "evaluate.command=python test.py {checkpoint} {split}"
    settings = [
        OWN,
        *TINY,
        f"collect.directory={checkpoints}",
        f"output={output}",
        f"evaluate.directory={tmp_path}",
        "evaluate.metric=norm",
        "evaluate.higher_is_better=false",
        "evaluate.noise_levels=[0.05]",
        "train.validate_every=3",
        command,
    ]
    result = join_job("pipeline", settings)
    assert result.returncode == 0, result.stderr
    report = json.loads((output / "report.json").read_text())
    norms = [
        load_file(output / "generated" / f"model_{i:06d}.safetensors")["embedding.weight"].norm()
        for i in (0, 2)
    ]
    assert report["metric"] == {"name": "norm", "higher_is_better": False, "unit": ""}
    assert report["score"]["generated_seen"]["mean"] == pytest.approx(float(sum(norms)) / 2)
    assert (report["score"]["generated_seen"]["n"], report["score"]["generated_seen"]["failed"]) == (2, 1)
    reason = "model_000001.safetensors: evaluate.command: exit status 1: this one is odd"
    assert report["left_out"] == [reason]
    assert f"evaluate: left out: {reason}" in result.stderr
    trained = [torch.load(file)["embedding.weight"].norm() for file in checkpoints.glob("*.pth")]
    assert report["score"]["originals"]["mean"] == pytest.approx(float(sum(trained)) / 6)
    assert report["metrics"]["scale"]["generated"]["n"] == 2
    assert list(report["score"]["baselines"]) == ["best_original", "centre"]
    assert report["score"]["baselines"]["best_original"]["mean"] == pytest.approx(max(norm.values()))
    assert "validation norm" in result.stderr
    assert "2 (1 failed)" in result.stdout


def test_a_command_that_is_not_there_is_refused_before_anything_is_done(call_job, checkpoints, tmp_path):
    assert rpg("register", checkpoints).returncode == 0
    settings = [OWN, *TINY, f"collect.directory={checkpoints}", f"output={tmp_path / 'run'}"]
    result = call_job("pipeline", [*settings, "evaluate.command=no-such-program {checkpoint}"])
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "ray_jobs.pipeline: error: evaluate.command: there is no program 'no-such-program'"
    )


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def adapters(tmp_path):
    """Twelve LoRA adapters along a short training, as PEFT saves them, with a tokenizer beside the first."""
    from peft import LoraConfig, get_peft_model

    directory = tmp_path / "adapters"
    network = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    words = torch.randint(32, (4, 16), generator=torch.Generator().manual_seed(0))
    for i in range(12):
        optimiser.zero_grad()
        network(input_ids=words, labels=words).loss.backward()
        optimiser.step()
        network.save_pretrained(directory / f"adapter_{i:02d}")
    (directory / "adapter_00" / "tokenizer.json").write_text("{}")
    return directory


def test_adapters_become_a_generator_of_adapters(join_job, adapters, tmp_path):
    from peft import PeftModel, get_peft_model_state_dict

    assert rpg("register", adapters).returncode == 0
    output = tmp_path / "run"
    settings = [OWN, *TINY, f"collect.directory={adapters}", f"output={output}"]
    result = join_job("pipeline", settings)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "new"
    made = rpg("generate", output / "generator", "--number", 2, "--seed", 1, "--out", out)
    assert made.returncode == 0, made.stderr
    assert made.stdout.split() == [str(out / f"model_{i:06d}") for i in range(2)]
    job = json.loads((output / "generated" / "job.json").read_text())
    staged = [output / "generated" / model["file"] for model in job["models"]]
    assert [path.name for path in staged] == [f"model_{i:06d}" for i in range(3)]
    for path in [*sorted(out.iterdir()), *staged]:
        assert sorted(file.name for file in path.iterdir()) == [
            "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"
        ]  # fmt: skip
        for name in ("adapter_config.json", "tokenizer.json"):
            assert (path / name).read_bytes() == (adapters / "adapter_00" / name).read_bytes()
        loaded = PeftModel.from_pretrained(llama(), str(path))
        weights = load_file(path / "adapter_model.safetensors")
        found = get_peft_model_state_dict(loaded)
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert loaded(input_ids=torch.arange(8)[None]).logits.isfinite().all()
    assert rpg("inspect", out / "model_000000").returncode == 0
    # Shards follow the files beside the weights, which a checkpoint's digest does not tell of.
    before = json.loads((output / "shards" / "layout.json").read_text())
    (adapters / "adapter_00" / "tokenizer.json").write_text('{"version": "1.0"}')
    (output / "stages" / "shard.json").unlink()
    assert join_job("shard", settings).returncode == 0
    after = json.loads((output / "shards" / "layout.json").read_text())
    assert after["companions"].pop("tokenizer.json") != before["companions"].pop("tokenizer.json")
    assert after == before
    assert not (output / "shards" / "pending").exists()


def test_a_checkpoint_changed_after_registering_is_refused(join_job, checkpoints, tmp_path):
    assert rpg("register", checkpoints).returncode == 0
    victim = next(checkpoints.glob("0002*.pth"))
    changed = {name: value * 2 for name, value in torch.load(victim).items()}
    torch.save(changed, victim)
    result = join_job("shard", [OWN, *TINY, f"collect.directory={checkpoints}", f"output={tmp_path / 'run'}"])
    assert result.returncode == 2
    assert victim.name in result.stderr
    assert "Traceback" not in result.stderr


def test_collecting_never_replaces_checkpoints_of_the_users(call_job, checkpoints, tmp_path):
    own = tmp_path / "work"
    shutil.move(checkpoints, own / "collection")
    before = {path: path.read_bytes() for path in (own / "collection").iterdir()}
    result = call_job("collect", [OWN, "tasks=digits", f"output={own}"])
    assert result.returncode == 2
    assert "did not make" in result.stderr
    assert {path: path.read_bytes() for path in (own / "collection").iterdir()} == before


def test_a_checkpoint_that_was_added_is_appended_until_refit(join_job, checkpoints, tmp_path):
    assert rpg("register", checkpoints).returncode == 0
    output = tmp_path / "run"
    settings = [OWN, *TINY, f"collect.directory={checkpoints}", f"output={output}"]
    assert join_job("shard", settings).returncode == 0
    first = (output / "shards" / "layout.json").read_bytes()
    shutil.copy(
        checkpoints / "0000_acc0.9013_class0314_tied.pth", checkpoints / "0006_acc0.9_class0278_more.pth"
    )
    assert rpg("register", checkpoints).returncode == 0
    refused = join_job("train", settings)
    assert refused.returncode == 2
    assert "stage 'train' needs stage 'shard'" in refused.stderr
    appended = join_job("shard", settings)
    assert appended.returncode == 0
    assert "1 new checkpoint appended; centre and scales stay those of the first 6" in appended.stderr
    assert (output / "shards" / "layout.json").read_bytes() == first
    assert join_job("shard", ["--refit", *settings]).returncode == 0
    assert (output / "shards" / "layout.json").read_bytes() != first
