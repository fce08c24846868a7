"""The published U-Net against a second implementation over bare parameters, and upstream's parameter list."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rpg.config import DenoiserConfig, DenoiserKind
from rpg.errors import RPGError
from rpg.generator.denoiser import build_denoiser
from rpg.generator.denoiser.unet import ConditionalUNet
from rpg.generator.embeddings import TimestepEmbedding

PUBLISHED = [1, 32, 64, 128, 64, 32, 1]


def build(
    channels: list[int], token_size: int = 24, prototype_width: int = 10, kernel_size: int = 7
) -> ConditionalUNet:
    torch.manual_seed(0)
    unet = ConditionalUNet(token_size, prototype_width, channels, kernel_size).double()
    for module in unet.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)
            module.running_mean = torch.randn_like(module.bias)
            module.running_var = torch.rand_like(module.bias) + 0.5
    return unet


def timestep_features(parameters: dict[str, Tensor], prefix: str, t: Tensor) -> Tensor:
    rows = []
    for step in t.tolist():
        angles = [step * 10000 ** (-k / 128) for k in range(128)]
        rows.append([math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles])
    hidden = torch.tensor(rows, dtype=torch.float64) @ parameters[f"{prefix}mlp.0.weight"].T
    hidden = hidden + parameters[f"{prefix}mlp.0.bias"]
    hidden = hidden / (1 + torch.exp(-hidden))
    return hidden @ parameters[f"{prefix}mlp.2.weight"].T + parameters[f"{prefix}mlp.2.bias"]


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Cross-correlation with zero padding, as a sum over shifts of matrix products."""
    reach = weight.shape[-1] // 2
    padded = torch.zeros(*x.shape[:2], x.shape[2] + 2 * reach, dtype=x.dtype)
    padded[..., reach : reach + x.shape[2]] = x
    out = sum(weight[:, :, k] @ padded[..., k : k + x.shape[2]] for k in range(weight.shape[-1]))
    assert isinstance(out, Tensor)
    return out + bias[:, None]


def normalised(x: Tensor, parameters: dict[str, Tensor], prefix: str, training: bool) -> Tensor:
    if training:
        mean = x.mean(dim=(0, 2))
        variance = ((x - mean[:, None]) ** 2).mean(dim=(0, 2))
    else:
        mean, variance = parameters[f"{prefix}.running_mean"], parameters[f"{prefix}.running_var"]
    scaled = (x - mean[:, None]) / torch.sqrt(variance[:, None] + 1e-5)
    scaled = scaled * parameters[f"{prefix}.weight"][:, None] + parameters[f"{prefix}.bias"][:, None]
    return torch.where(scaled > 0, scaled, torch.exp(scaled) - 1)


def second_implementation(
    parameters: dict[str, Tensor], layers: int, x: Tensor, t: Tensor, prototype: Tensor, training: bool
) -> Tensor:
    """Layers numbered through: n of the encoder, then the decoder, whose layer j adds output n - 3 - j."""
    encoder = (layers + 1) // 2 + 1
    time = timestep_features(parameters, "time_embedder.", t)[:, None]
    c = (prototype @ parameters["condi_embedder.weight"].T + parameters["condi_embedder.bias"])[:, None]
    outputs: list[Tensor] = []
    h = x[:, None]
    for layer in range(layers):
        if layer < encoder:
            prefix = f"encoder_list.{layer}"
        else:
            prefix = f"decoder_list.{layer - encoder}"
            h = h + outputs[encoder - 3 - (layer - encoder)]
        h = convolution((h + c) * time, parameters[f"{prefix}.0.weight"], parameters[f"{prefix}.0.bias"])
        if layer < layers - 1:
            h = normalised(h, parameters, f"{prefix}.1.0", training)
        outputs.append(h)
    return h[:, 0]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("channels", "kernel_size"), [(PUBLISHED, 7), ([1, 3, 2, 3, 1], 3), ([1, 2, 3, 4, 5, 4, 3, 2, 1], 1)]
)
def test_equals_a_second_implementation(channels: list[int], kernel_size: int, training: bool) -> None:
    unet = build(channels, kernel_size=kernel_size).train(training)
    parameters = {name: value.clone() for name, value in unet.state_dict().items()}
    x = torch.randn(5, 24, dtype=torch.float64)
    t = torch.tensor([0, 1, 7, 500, 999])
    prototype = torch.randn(5, 10, dtype=torch.float64)
    expected = second_implementation(parameters, len(channels) - 1, x, t, prototype, training)
    actual = unet(x, t, prototype)
    assert actual.shape == x.shape
    # The published frequencies are float32; at t = 999 that is 1e-4 in phase.
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_tokens_are_independent_in_evaluation_mode() -> None:
    unet = build(PUBLISHED).eval()
    x, t = torch.randn(6, 24, dtype=torch.float64), torch.arange(6) * 100
    prototype = torch.randn(6, 10, dtype=torch.float64)
    together = unet(x, t, prototype)
    alone = torch.cat([unet(x[i : i + 1], t[i : i + 1], prototype[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(together, alone)


def test_groups_of_tokens_share_a_timestep() -> None:
    unet = build(PUBLISHED).eval()
    x, prototype = torch.randn(6, 24, dtype=torch.float64), torch.randn(6, 10, dtype=torch.float64)
    expected = unet(x, torch.tensor([3, 3, 3, 900, 900, 900]), prototype)
    torch.testing.assert_close(unet(x, torch.tensor([3, 900]), prototype), expected)
    torch.testing.assert_close(unet.denoise(x, torch.tensor([3, 900]), unet.prepare(prototype)), expected)


def test_state_dict_is_upstreams() -> None:
    expected = {"time_embedder.freqs", "condi_embedder.weight", "condi_embedder.bias"}
    expected |= {f"time_embedder.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    layers = [f"encoder_list.{i}" for i in range(4)] + [f"decoder_list.{i}" for i in range(2)]
    expected |= {f"{layer}.0.{kind}" for layer in layers for kind in ("weight", "bias")}
    buffers = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected |= {f"{layer}.1.0.{kind}" for layer in layers[:-1] for kind in buffers}
    unet = build(PUBLISHED)
    assert set(unet.state_dict()) == expected
    assert unet.state_dict()["time_embedder.mlp.0.weight"].shape == (24, 256)
    assert unet.state_dict()["encoder_list.2.0.weight"].shape == (128, 64, 7)


def test_parameter_count() -> None:
    unet = build(PUBLISHED, token_size=24, prototype_width=10)
    convolutions = 7 * (32 + 32 * 64 + 64 * 128 + 128 * 64 + 64 * 32 + 32) + (32 + 64 + 128 + 64 + 32 + 1)
    norms = 2 * (32 + 64 + 128 + 64 + 32)
    time = (256 * 24 + 24) + (24 * 24 + 24)
    condition = 10 * 24 + 24
    assert sum(p.numel() for p in unet.parameters()) == convolutions + norms + time + condition


def test_all_parameters_are_trained() -> None:
    unet = build(PUBLISHED).train()
    unet(torch.randn(4, 24).double(), torch.arange(4), torch.randn(4, 10).double()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


@pytest.mark.parametrize("channels", [[1, 2, 1], [1, 2, 3, 2], [1, 2, 3, 4, 1], [2, 3, 4, 3, 2]])
def test_impossible_channels_are_refused(channels: list[int]) -> None:
    with pytest.raises(RPGError, match="channels"):
        ConditionalUNet(8, 8, channels, 3)


def test_even_kernels_are_refused() -> None:
    with pytest.raises(RPGError, match="kernel_size"):
        ConditionalUNet(8, 8, [1, 2, 3, 2, 1], 4)


def test_timestep_embedding_follows_its_formula() -> None:
    torch.manual_seed(0)
    embedding = TimestepEmbedding(12)
    t = torch.tensor([0, 3, 250, 999])
    double = {name: value.double() for name, value in embedding.state_dict().items()}
    torch.testing.assert_close(embedding(t).double(), timestep_features(double, "", t), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(embedding(t.float()), embedding(t))
    assert embedding.bfloat16()(t).dtype == torch.bfloat16


def test_timestep_embedding_refuses_odd_frequencies() -> None:
    with pytest.raises(RPGError, match="frequencies"):
        TimestepEmbedding(12, frequencies=7)


@pytest.mark.parametrize("kind", list(DenoiserKind))
def test_built_denoisers_map_tokens_to_tokens(kind: DenoiserKind) -> None:
    denoiser = build_denoiser(DenoiserConfig(kind=kind, width=32, depth=2), token_size=20, prototype_width=8)
    out = denoiser(torch.randn(3, 20), torch.tensor([0, 5, 999]), torch.randn(3, 8))
    assert out.shape == (3, 20)
    assert out.isfinite().all()
    assert F.mse_loss(out, torch.zeros(3, 20)).isfinite()
