"""Rows in 8-bit floats against PyTorch's own conversion, and products of them against float64."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from rpg.config import DenoiserConfig, DenoiserKind, GeneratorConfig, SamplingConfig, validate_sampling
from rpg.errors import RPGError
from rpg.generator.denoiser.adaln_mlp import AdaLNMLP
from rpg.sampling.precision import samples_in_float8, used_precision

LARGEST = torch.finfo(torch.float8_e4m3fn).max


def rows_in_float8(x):
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), torch.full((len(x), 1), torch.nan, device=x.device)


def assert_rounded(out, scales, exact):
    """Three bits of mantissa, and the row's largest value is the format's."""
    torch.testing.assert_close(scales, exact.abs().amax(1, keepdim=True) / LARGEST, rtol=1e-5, atol=0)
    steps = (exact / scales).abs().clamp(min=2**-6).log2().floor().exp2() / 8
    off = (out.float() - exact / scales).abs() > 0.51 * steps
    # Triton's interpreter cuts what should round up to a power of two, and numbers below the normal ones.
    assert off.float().mean() <= (0 if exact.is_cuda else 0.2)
    assert out.float().isfinite().all()


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [16, 96, 256])
def test_quantise_rows(device, width, silu):
    from rpg.sampling.gpu.kernels.float8 import quantise_rows

    random = torch.Generator().manual_seed(0)
    x = (torch.randn(7, width, generator=random) * torch.logspace(-6, 6, 7)[:, None]).to(device)
    out, scales = rows_in_float8(x)
    quantise_rows(x, out, scales, silu)
    assert_rounded(out, scales, F.silu(x) if silu else x)


def test_numbers_of_the_format_stay_as_they_are(device):
    from rpg.sampling.gpu.kernels.float8 import quantise_rows

    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = numbers[numbers.isfinite()]
    x = torch.stack([numbers * 2.0**power for power in (-20, -1, 0, 9)]).to(device)
    out, scales = rows_in_float8(x)
    quantise_rows(x, out, scales)
    torch.testing.assert_close(out.float() * scales, x, rtol=0, atol=0)


def test_a_row_of_zeros(device):
    from rpg.sampling.gpu.kernels.float8 import quantise_rows

    out, scales = rows_in_float8(torch.zeros(2, 32, device=device))
    quantise_rows(torch.zeros(2, 32, device=device), out, scales)
    assert not (out.float() * scales).any() and scales.isfinite().all() and (scales > 0).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("width", [16, 96, 256])
def test_modulated_rows(device, width, gated):
    from rpg.sampling.gpu.kernels.adaln import add_gated_normalise_modulate, normalise_modulate

    random = torch.Generator().manual_seed(0)
    x, branch = torch.randn(2, 5, width, generator=random).to(device)
    modulation = torch.randn(5, 4 * width, generator=random).to(device)
    by_time = torch.randn(4 * width, generator=random).to(device)
    exact = torch.empty_like(x)
    out, scales = rows_in_float8(x)
    for y, found in ((exact, None), (out, scales)):
        if gated:
            add_gated_normalise_modulate(x.clone(), branch, modulation, by_time, 0, 2 * width, y, found)
        else:
            normalise_modulate(x, modulation, by_time, width, y, found)
    assert_rounded(out, scales, exact)


def exact_product(a, a_scales, b, b_scales, bias, dtype):
    product = (a.double() * a_scales) @ (b.double() * b_scales)
    return (product if bias is None else product + bias).to(dtype)


def denoiser_and_inputs(device):
    torch.manual_seed(0)
    denoiser = AdaLNMLP(token_size=64, width=128, depth=2, prototype_width=32)
    for parameter in denoiser.parameters():
        # Output and modulation start at zero.
        torch.nn.init.normal_(parameter, std=0.05)
    return denoiser.to(device), torch.randn(48, 64, device=device), torch.randn(48, 32, device=device)


def test_denoiser(device, monkeypatch):
    from rpg.sampling.gpu import adaln_mlp
    from rpg.sampling.gpu.adaln_mlp import AdaLNMLPOnGPU

    if device.type == "cpu":
        # PyTorch has these products for GPUs alone.
        monkeypatch.setattr(adaln_mlp, "scaled_product", exact_product)
    denoiser, x, prototypes = denoiser_and_inputs(device)
    dtype = torch.bfloat16
    with torch.inference_mode():
        expected = denoiser(x, torch.tensor([300], device=device), prototypes)
        fast = AdaLNMLPOnGPU(denoiser, [500, 300], dtype, float8=True)
        found = fast.denoise(x.to(dtype), 1, fast.prepare(prototypes))
    assert found.dtype == dtype
    error = float((found - expected).norm() / expected.norm())
    assert error < (0.06 if device.type == "cuda" else 0.12)
    assert error > 0.005, "nothing was rounded to 8 bits"


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch has 8-bit products with row scales on GPUs"
)
@pytest.mark.parametrize("shape", [(48, 64, 128), (1536, 8192, 4096)])
def test_product(shape):
    from rpg.sampling.gpu.adaln_mlp import Product
    from rpg.sampling.gpu.kernels.float8 import quantise_rows

    rows, inputs, outputs = shape
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs, device="cuda")
    x = torch.randn(rows, inputs, device="cuda")
    y, scales = rows_in_float8(x)
    quantise_rows(x, y, scales)
    product = Product(layer, torch.bfloat16, float8=True)
    with torch.inference_mode():
        found = product(y, scales)
        weight_scales = layer.weight.abs().amax(1, keepdim=True) / LARGEST
        weight = (layer.weight / weight_scales).to(torch.float8_e4m3fn)
        expected = exact_product(y, scales, weight.T, weight_scales.T, layer.bias, torch.float64)
    assert float((found - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="PyTorch has 8-bit products with row scales on GPUs"
)
def test_a_row_does_not_depend_on_its_place():
    from rpg.sampling.gpu.adaln_mlp import AdaLNMLPOnGPU

    torch.manual_seed(0)
    denoiser = AdaLNMLP(token_size=768, width=1024, depth=2, prototype_width=64).cuda()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    fast = AdaLNMLPOnGPU(denoiser, [500], torch.bfloat16, float8=True)
    x, prototypes = torch.randn(2048, 768, device="cuda").bfloat16(), torch.randn(2048, 64, device="cuda")
    order = torch.randperm(2048, device="cuda")
    with torch.inference_mode():
        found = fast.denoise(x, 0, fast.prepare(prototypes))
        moved = fast.denoise(x[order], 0, fast.prepare(prototypes[order]))
    assert torch.equal(moved, found[order])


@pytest.mark.parametrize(
    ("precision", "capability", "token_size", "width", "expected"),
    [
        ("float8", (9, 0), 64, 128, True),
        ("float8", (8, 9), 64, 128, True),
        ("float8", (8, 0), 64, 128, False),
        ("float8", (9, 0), 72, 128, False),
        ("float8", (9, 0), 64, 136, False),
        ("auto", (9, 0), 64, 128, False),
    ],
)
def test_where_products_have_8_bits(monkeypatch, precision, capability, token_size, width, expected):
    generator = SimpleNamespace(
        layout=SimpleNamespace(token_size=token_size),
        config=GeneratorConfig(denoiser=DenoiserConfig(width=width)),
        positions=torch.empty(0),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    sampling = SamplingConfig(precision=precision)
    assert samples_in_float8(generator, sampling) == expected
    # On this device, which is none of those.
    assert used_precision(generator, sampling) == "float32"


def test_the_unet_has_none():
    config = GeneratorConfig(denoiser=DenoiserConfig(kind=DenoiserKind.unet))
    sampling = SamplingConfig(precision="float8")
    with pytest.raises(
        RPGError, match=r"^sampling.precision: float8 needs denoiser.kind adaln_mlp, got unet$"
    ):
        validate_sampling(sampling, config, "sampling.")
