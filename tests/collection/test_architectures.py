"""Real networks are turned into tokens and back: torchvision's, and adapters made by PEFT."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer

from rpg.collection.layout import Layout
from rpg.collection.statistics import LayoutStatistics
from rpg.collection.tensor_spec import TensorKind
from rpg.config import Normalisation

pytestmark = pytest.mark.slow

StateDict = dict[str, Tensor]

LEFT_OUT = ((2, 192), (2, 384), (26, 768), (2, 1536))
CASES = [
    # name, parameters as in torchvision's documentation, token size
    ("resnet18", 11_689_512, 8192),
    ("resnet50", 25_557_032, 8192),
    ("convnext_tiny", 28_589_128, 256),
    ("mobilenet_v3_large", 5_483_032, 1000),
    # All tensors of convnext_large and vit_b_16 but for 32 and 10 of their blocks. A block of ConvNeXt has
    # 8 w² + 58 w parameters (w: its width), one of the ViT 7,087,872.
    ("shallow_convnext_large", 197_767_336 - sum(n * (8 * w + 58) * w for n, w in LEFT_OUT), 16384),
    ("shallow_vit_b_16", 86_567_656 - 10 * 7_087_872, 8192),
]


def build(name: str) -> nn.Module:
    if name == "shallow_convnext_large":
        widths = (192, 384, 768, 1536)
        return ConvNeXt(list(map(CNBlockConfig, widths, (*widths[1:], None), (1, 1, 1, 1))))
    if name == "shallow_vit_b_16":
        return VisionTransformer(224, 16, num_layers=2, num_heads=12, hidden_dim=768, mlp_dim=3072)
    return torchvision.models.get_model(name, weights=None)


@pytest.fixture
def cheap_initialisation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Truncated normals take seconds for the large networks; any values will do here."""

    def uniform(tensor: Tensor, *_: Any, std: float = 1.0, **__: Any) -> Tensor:
        return nn.init.uniform_(tensor, -2 * std, 2 * std)

    with monkeypatch.context() as patch:
        patch.setattr(nn.init, "trunc_normal_", uniform)
        yield


@pytest.mark.usefixtures("cheap_initialisation")
@pytest.mark.parametrize(("name", "parameters", "token_size"), CASES, ids=[case[0] for case in CASES])
def test_torchvision_networks_come_back(name: str, parameters: int, token_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    network = build(name)
    with torch.no_grad():
        for key, buffer in network.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(generator=generator)
            elif key.endswith("running_var"):
                buffer.exponential_(generator=generator)
    first = {key: value.clone() for key, value in network.state_dict().items()}
    perturb(network.state_dict(), generator)
    second = network.state_dict()
    for normalisation in Normalisation:
        layout = layout_of([first, second], token_size, normalisation)
        tokenised = [spec for spec in layout.specs if spec.tokens]
        assert layout.tokens == sum(math.ceil(spec.numel / token_size) for spec in tokenised)
        if normalisation == Normalisation.residual:
            assert {spec.name for spec in tokenised} >= {key for key, _ in network.named_parameters()}
            buffers = sum(spec.numel for spec in tokenised) - parameters
            assert buffers == sum(spec.numel for spec in tokenised if "running_" in spec.name)
        decoded = layout.decode(layout.encode(second))
        assert_close(decoded, second, layout)
        network.load_state_dict(decoded, strict=True)
        second = network.state_dict()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_peft_adapters_come_back(dora: bool) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM

    def build() -> Any:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
        lora = LoraConfig(r=4, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")
        return get_peft_model(LlamaForCausalLM(config), lora)

    torch.manual_seed(0)
    network = build()
    first = {key: value.clone() for key, value in get_peft_model_state_dict(network).items()}
    assert len(first) == 2 * 6 * (3 if dora else 2)
    perturb(get_peft_model_state_dict(network), torch.Generator().manual_seed(0))
    second = get_peft_model_state_dict(network)
    layout = layout_of([first, second], 100, Normalisation.residual)
    assert all(spec.tokens for spec in layout.specs)
    decoded = layout.decode(layout.encode(second))
    assert_close(decoded, second, layout)
    other = build()
    result: Any = set_peft_model_state_dict(other, decoded)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora" in key]
    loaded = get_peft_model_state_dict(other)
    assert all(torch.equal(loaded[key], decoded[key]) for key in decoded)


def test_tied_embeddings_of_a_language_model_come_back() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def build() -> Any:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
        network: Any = LlamaForCausalLM(config)
        return network.to(torch.bfloat16)

    torch.manual_seed(0)
    collection = [build().state_dict() for _ in range(3)]
    layout = layout_of(collection, 64, Normalisation.residual)
    specs = {spec.name: spec for spec in layout.specs}
    assert specs["lm_head.weight"].alias_of == "model.embed_tokens.weight"
    decoded = layout.decode(layout.encode(collection[1]))
    assert decoded["lm_head.weight"] is decoded["model.embed_tokens.weight"]
    assert_close(decoded, collection[1], layout)
    build().load_state_dict(decoded, strict=True)


def layout_of(state_dicts: list[StateDict], token_size: int, normalisation: Normalisation) -> Layout:
    statistics = LayoutStatistics(state_dicts[0])
    for state_dict in state_dicts:
        statistics.update(state_dict)
    return statistics.layout(token_size, normalisation)


def perturb(state_dict: StateDict, generator: torch.Generator) -> None:
    """Another checkpoint, in place: floats are changed by some percent, counters by one."""

    def factors(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor).uniform_(0.9, 1.1, generator=generator)

    with torch.no_grad():
        for name, tensor in state_dict.items():
            if not tensor.is_floating_point():
                tensor += 1
                continue
            tensor *= factors(tensor)
            if not name.endswith("running_var"):
                tensor += factors(tensor).sub_(1).mul_(0.1)


def assert_close(decoded: StateDict, expected: StateDict, layout: Layout) -> None:
    assert list(decoded) == list(expected)
    for spec in layout.specs:
        found, given = decoded[spec.name], expected[spec.name]
        assert (found.shape, found.dtype) == (given.shape, given.dtype), spec.name
        if spec.kind == TensorKind.constant:
            assert torch.equal(found, given), spec.name
            continue
        if spec.kind == TensorKind.running_var:
            given = given.clamp(min=spec.floor * spec.pre_mean)
        epsilon = max(torch.finfo(spec.dtype).eps, 2.0**-20)
        largest = (
            float(given.abs().max()) + abs(spec.mean) + spec.scale + spec.pre_mean * (spec.pre_mean != 1)
        )
        error = float((found - given).abs().max())
        assert error <= epsilon * largest, spec.name
