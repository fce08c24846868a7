"""`rpg export`: PyTorch files, and adapters merged into their base as PEFT itself merges them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rpg.commands.main import main


class Network(nn.Module):
    """Every kind of layer that LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(30, 12)
        self.linear = nn.Linear(12, 20)
        self.conv = nn.Conv2d(3, 8, 3)
        self.pointwise = nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(20, 5)


ALL = ["words", "linear", "conv", "pointwise"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ALL, "r": 4, "lora_alpha": 6},
    "rank-stabilised": {"target_modules": ALL, "r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"target_modules": ["linear", "conv", "pointwise"], "r": 3, "use_dora": True},
    "dora of an embedding": {"target_modules": ["words"], "r": 3, "use_dora": True},
    "patterns": {
        "target_modules": ALL,
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"linear": 2},
        "alpha_pattern": {"conv": 32, "^words": 3},
    },
    "biases": {"target_modules": ["linear", "conv"], "r": 4, "bias": "lora_only"},
    "a bias of its own": {"target_modules": ["linear", "conv"], "r": 4, "lora_bias": True},
    "a saved module": {"target_modules": ["linear"], "r": 4, "modules_to_save": ["head"]},
}


def adapted(network: nn.Module, directory: Path, **settings: Any) -> Any:
    """A PEFT model whose adapter, saved in `directory`, is no identity."""
    model: Any = get_peft_model(network, LoraConfig(**settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)
    return model


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_merged_adapter_is_what_peft_makes_of_it(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    network = Network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    save_file(before, tmp_path / "base.safetensors", {"format": "pt"})
    expected = adapted(network, tmp_path / "adapter", **CASES[case]).merge_and_unload().state_dict()
    changed = [name for name in before if not torch.equal(before[name], expected[name])]
    assert len(changed) >= len(CASES[case]["target_modules"])
    for name in ("merged.safetensors", "merged.pt"):
        arguments = [
            str(tmp_path / "adapter"),
            str(tmp_path / name),
            "--base",
            str(tmp_path / "base.safetensors"),
        ]
        assert main(["export", *arguments]) == 0, capsys.readouterr().err
    assert_equal(load_file(tmp_path / "merged.safetensors"), expected)
    assert_equal(torch.load(tmp_path / "merged.pt", weights_only=True), expected)
    Network().load_state_dict(torch.load(tmp_path / "merged.pt", weights_only=True), strict=True)


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        )
    )  # fmt: skip


def gpt2() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4))


LANGUAGE_MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "r": 4}),
    "llama, tied": (lambda: llama(tied=True), {"target_modules": ["q_proj", "up_proj"], "r": 4}),
    "llama, dora": (llama, {"target_modules": ["q_proj", "v_proj"], "r": 4, "use_dora": True}),
    # Its linear layers keep their weights transposed.
    "gpt2": (gpt2, {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True}),
    "gpt2, dora": (gpt2, {"target_modules": ["c_attn"], "r": 4, "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize("parts", [False, True], ids=["one file", "parts"])
@pytest.mark.parametrize("case", LANGUAGE_MODELS)
def test_a_merged_language_model_loads_and_answers_as_with_its_adapter(
    case: str, parts: bool, tmp_path: Path
) -> None:
    build, settings = LANGUAGE_MODELS[case]
    size = "20KB" if parts else "1GB"
    build().save_pretrained(tmp_path / "base", max_shard_size=size)
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() == parts
    adapted(build(), tmp_path / "adapter", task_type="CAUSAL_LM", **settings)
    out = tmp_path / "merged"
    assert main(["export", str(tmp_path / "adapter"), str(out), "--base", str(tmp_path / "base")]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip
    merged: Any = AutoModelForCausalLM.from_pretrained(out)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    words = torch.arange(16)[None]
    with torch.no_grad():
        plain = base(words).logits.clone()
        expected = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(words).logits
        found = merged.eval()(words).logits
    assert float((expected - plain).abs().max()) > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("build", [lambda: llama(tied=True), gpt2], ids=["stated", "by default"])
def test_an_embedding_that_is_the_output_layer_too_is_refused(
    build: Callable[[], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT adapts the embedding alone. Merged, the output layer would change with it."""
    build().save_pretrained(tmp_path / "base")
    adapted(build(), tmp_path / "adapter", task_type="CAUSAL_LM", target_modules=["embed_tokens", "wte"])
    out = tmp_path / "merged"
    assert main(["export", str(tmp_path / "adapter"), str(out), "--base", str(tmp_path / "base")]) == 2
    assert "its output layer is tied to '" in capsys.readouterr().err
    assert not out.exists()


def test_half_precision_is_merged_in_full_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Network()
    base = {name: value.to(torch.bfloat16) for name, value in network.state_dict().items()}
    save_file(base, tmp_path / "base.safetensors")
    adapted(network, tmp_path / "adapter", target_modules=["linear"], r=4, lora_alpha=4)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    out = tmp_path / "out.safetensors"
    assert (
        main(["export", str(tmp_path / "adapter"), str(out), "--base", str(tmp_path / "base.safetensors")])
        == 0
    )
    a = adapter["base_model.model.linear.lora_A.weight"]
    b = adapter["base_model.model.linear.lora_B.weight"]
    merged = load_file(out)
    assert torch.equal(merged["linear.weight"], (base["linear.weight"].float() + b @ a).to(torch.bfloat16))
    assert torch.equal(merged["conv.weight"], base["conv.weight"])


def test_the_base_of_another_class_is_found_by_the_names_that_both_have(tmp_path: Path) -> None:
    """A network with a head has a prefix that the network alone, which many bases are, does not have."""
    torch.manual_seed(0)
    network = Network()
    save_file({f"net.{k}": v.clone() for k, v in network.state_dict().items()}, tmp_path / "base.safetensors")
    model = adapted(network, tmp_path / "adapter", target_modules=["linear"], r=4)
    out = tmp_path / "out.safetensors"
    base = str(tmp_path / "base.safetensors")
    assert main(["export", str(tmp_path / "adapter"), str(out), "--base", base]) == 0
    expected = model.merge_and_unload().state_dict()
    assert_equal(load_file(out), {f"net.{name}": value for name, value in expected.items()})


def test_a_model_becomes_a_pytorch_file_with_its_ties(tmp_path: Path) -> None:
    shared = torch.randn(4, 3)
    torch.save({"a": shared, "b": shared, "part": torch.randn(1000)[:5]}, tmp_path / "model.pt")
    out = tmp_path / "out.pth"
    assert main(["export", str(tmp_path / "model.pt"), str(out)]) == 0
    found = torch.load(out, weights_only=True)
    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert torch.equal(found["a"], shared)
    assert out.stat().st_size < 3000, "of a part only the part is written"
    assert main(["export", str(out), str(tmp_path / "again.safetensors")]) == 0
    assert torch.equal(load_file(tmp_path / "again.safetensors")["b"], shared)


def test_what_cannot_be_exported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = Network()
    base = tmp_path / "base.safetensors"
    save_file(network.state_dict(), base)
    adapter = tmp_path / "adapter"
    adapted(network, adapter, target_modules=["linear"], r=4)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    a, b = (f"base_model.model.linear.lora_{factor}.weight" for factor in "AB")

    def refused(words: str, *arguments: object, **changes: Any) -> None:
        (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes.get("config", {})}))
        save_file({**weights, **changes.get("weights", {})}, adapter / "adapter_model.safetensors")
        capsys.readouterr()
        assert main(["export", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("rpg: error: ") and error.count("\n") == 1
        assert words in error
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.pt").exists()

    merging = (adapter, tmp_path / "out.pt", "--base", base)
    refused("out: expected a name that ends with .pt, .pth, .safetensors", adapter, tmp_path / "out")
    refused("has no configuration to lie beside", adapter, tmp_path / "out", "--base", base)
    refused("--base is for adapters", base, tmp_path / "out.pt", "--base", base)
    refused('peft_type: expected LORA, got "IA3"', *merging, config={"peft_type": "IA3"})
    refused("alpha_pattern: expected finite numbers", *merging, config={"lora_alpha": None})
    refused("alpha_pattern: not a regular", *merging, config={"alpha_pattern": {"(": 1}})
    refused("modules_to_save: expected a list", *merging, config={"modules_to_save": 3})
    refused("expected factors of shapes", *merging, weights={a: torch.zeros(0, 12)})
    refused("init_lora_weights: 'pissa' changes the base", *merging, config={"init_lora_weights": "pissa"})
    refused("layer_replication: cannot be merged", *merging, config={"layer_replication": [[0, 1]]})
    refused(
        "expected a change of shape [20, 12], as 'linear.weight' of", *merging,
        weights={b: torch.zeros(21, 4)},
    )  # fmt: skip
    refused("A and B do not fit", *merging, weights={b: torch.zeros(20, 5)})
    refused(
        "tensor 'base_model.model.other.lora_B.weight' is missing", *merging,
        weights={"base_model.model.other.lora_A.weight": torch.zeros(4, 12)},
    )  # fmt: skip
    refused(
        "has no tensor 'other.weight'", *merging,
        weights={
            "base_model.model.other.lora_A.weight": torch.zeros(4, 12),
            "base_model.model.other.lora_B.weight": torch.zeros(20, 4),
        },
    )  # fmt: skip
    refused("cannot be merged; expected factors", *merging, weights={a + "_extra": torch.zeros(1)})
    refused("found [3]", *merging, weights={"base_model.model.linear.lora_magnitude_vector": torch.zeros(3)})
    (tmp_path / "taken").mkdir()
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "config.json").write_text("{}")
    save_file(network.state_dict(), tmp_path / "dir" / "model.safetensors")
    refused("taken: is there already", adapter, tmp_path / "taken", "--base", tmp_path / "dir")
