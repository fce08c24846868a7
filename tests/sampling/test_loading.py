"""Generated models load where the originals did: in torchvision, timm, PEFT and Transformers themselves.

Each collection is saved by the library, registered, and turned into a layout. The tokens of one original are
then written as if they had been sampled, and the library loads what is there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.companions import companions_of
from rpg.collection.layout import Layout
from rpg.collection.register import register
from rpg.collection.statistics import LayoutStatistics
from rpg.collection.tensor_spec import TensorKind
from rpg.config import Normalisation
from rpg.sampling.model_writer import ModelWriter

StateDict = dict[str, Tensor]


@pytest.fixture(autouse=True)
def cheap_initialisation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Drawing normals takes seconds for the large networks; any values will do here."""

    def uniform(tensor: Tensor, *_: Any, **__: Any) -> Tensor:
        return nn.init.uniform_(tensor, -0.05, 0.05)

    with monkeypatch.context() as patch:
        for name in ("trunc_normal_", "normal_", "kaiming_normal_"):
            patch.setattr(nn.init, name, uniform)
        yield


def perturbed(network: nn.Module, seed: int) -> nn.Module:
    """The network with other values in place, those of its buffers as well."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            # Blocks of noise, since drawing every value takes long.
            noise = torch.rand(min(tensor.numel(), 2**16), generator=generator)
            flat = tensor.view(-1)
            for start in range(0, flat.numel(), noise.numel()):
                part = flat[start : start + noise.numel()]
                part.mul_(1 + 0.1 * noise[: part.numel()])
                if not name.endswith("running_var"):
                    part.add_(0.01 * noise[: part.numel()])
    return network


def regenerated(directory: Path, out: Path, token_size: int) -> tuple[Path, StateDict, Layout]:
    """A model with the weights of the second checkpoint in `directory`, those weights, and the layout."""
    collection, problems = register(directory)
    assert not problems
    statistics = LayoutStatistics(collection.read(collection.entries[0]))
    for entry in collection.entries:
        statistics.update(collection.read(entry))
    companions = companions_of(collection.path(collection.entries[0]))
    layout = statistics.layout(token_size, Normalisation.residual).with_companions(companions)
    original = collection.read(collection.entries[1])
    path = out / ("model" if companions else "model.safetensors")
    file = ModelWriter(path, layout, {"format": "pt"}, companions=companions).open()
    tokens = layout.encode(original).tokens
    for index in range(layout.tokens):
        file.write_token(index, tokens[index])
    file.commit()
    weights = path / companions.weights_name if companions else path
    with safe_open(weights, framework="pt") as opened:
        assert opened.metadata()["format"] == "pt"
    return path, original, layout


def assert_close(found: StateDict, expected: StateDict, layout: Layout) -> None:
    """Equal names, dtypes and values: to the bit for constants, to rounding for all others."""
    assert found.keys() == expected.keys()
    kinds = {spec.name: spec.kind for spec in layout.specs}
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        if kinds.get(name, TensorKind.constant) == TensorKind.constant:
            assert torch.equal(found[name], tensor), name
            continue
        epsilon = max(torch.finfo(tensor.dtype).eps, 2.0**-20)
        assert float((found[name] - tensor).abs().max()) <= 4 * epsilon * float(tensor.abs().max()), name


TORCHVISION = [
    pytest.param("resnet18", torch.float32, id="resnet18"),
    pytest.param("resnet50", torch.float32, id="resnet50"),
    pytest.param("convnext_tiny", torch.float32, id="convnext_tiny"),
    # Half of the bytes, since these have 87 and 198 million values.
    pytest.param("vit_b_16", torch.bfloat16, id="vit_b_16", marks=pytest.mark.slow),
    pytest.param("convnext_large", torch.bfloat16, id="convnext_large", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "dtype"), TORCHVISION)
def test_torchvision_networks_load_strictly(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = tmp_path / "networks"
    directory.mkdir()
    network: Any = torchvision.models.get_model(name, weights=None).to(dtype)
    for index in range(2):
        torch.save(perturbed(network, index).state_dict(), directory / f"{index}.pt")
    path, original, layout = regenerated(directory, tmp_path, 2**18)
    assert path.is_file()
    found = read_checkpoint(path)
    assert_close(found, original, layout)
    network.load_state_dict(found, strict=True)


TIMM = ["vit_tiny_patch16_224", "convnext_atto", "resnet50_gn", "mobilenetv3_small_100"]


@pytest.mark.parametrize("name", TIMM)
def test_timm_loads_the_directories(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "networks"
    network = timm.create_model(name, pretrained=False, num_classes=7)
    for index in range(2):
        (directory / str(index)).mkdir(parents=True)
        timm.models.save_for_hf(
            perturbed(network, index), directory / str(index), model_args={"num_classes": 7}
        )
    path, original, layout = regenerated(directory, tmp_path, 16_384)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "model.safetensors"]
    assert (path / "config.json").read_bytes() == (directory / "0" / "config.json").read_bytes()
    loaded = timm.create_model(f"local-dir:{path}", pretrained=True)
    assert_close(loaded.state_dict(), original, layout)
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        expected = perturbed(network, 2).eval()
        expected.load_state_dict(original, strict=True)
        torch.testing.assert_close(loaded.eval()(images), expected(images), rtol=1e-3, atol=1e-4)


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("rank", [4, 16, 64])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_loads_the_directories(dora: bool, rank: int, tmp_path: Path) -> None:
    directory = tmp_path / "adapters"
    targets = ["q_proj", "v_proj", "down_proj"]
    adapter: Any = get_peft_model(
        llama(), LoraConfig(r=rank, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")
    )
    for index in range(3):
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad:
                noise = torch.Generator().manual_seed(len(name) + 100 * index)
                parameter.data += 0.1 * torch.rand(parameter.shape, generator=noise)
        adapter.save_pretrained(directory / f"adapter_{index}")
        if index == 1:
            with torch.no_grad():
                expected = adapter.eval()(torch.arange(16)[None]).logits
    (directory / "adapter_0" / "training_args.bin").write_bytes(b"private")
    path, original, layout = regenerated(directory, tmp_path, 100)
    assert sorted(file.name for file in path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    assert (path / "adapter_config.json").read_bytes() == (
        directory / "adapter_0" / "adapter_config.json"
    ).read_bytes()
    loaded: Any = PeftModel.from_pretrained(llama(), str(path))
    assert_close(get_peft_model_state_dict(loaded), original, layout)
    with torch.no_grad():
        found = loaded.eval()(torch.arange(16)[None]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def encoder() -> Any:
    torch.manual_seed(0)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32,
        )
    )  # fmt: skip


def save_words(directory: Path) -> None:
    """A tokenizer as Transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "cat": 1, "dog": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(directory)


@pytest.mark.parametrize("form", ["one file", "parts", "a pickle"])
def test_transformers_loads_the_directories(form: str, tmp_path: Path) -> None:
    """The decoder of a masked language model is tied to its embedding."""
    directory = tmp_path / "encoders"
    network = encoder()
    for index in range(2):
        place = directory / f"encoder_{index}"
        perturbed(network, index).save_pretrained(place, max_shard_size="20KB" if form == "parts" else "1GB")
        if form == "a pickle":
            (place / "model.safetensors").unlink()
            torch.save(network.state_dict(), place / "pytorch_model.bin")
        save_words(place)
    path, original, layout = regenerated(directory, tmp_path, 64)
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    loaded, found = BertForMaskedLM.from_pretrained(path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    weights = loaded.state_dict()
    assert_close({name: weights[name] for name in original}, original, layout)
    assert loaded.cls.predictions.decoder.weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert AutoTokenizer.from_pretrained(path)("dog cat")["input_ids"] == [2, 1]
    assert AutoModel.from_pretrained(path)(torch.tensor([[2, 1]])).last_hidden_state.isfinite().all()
