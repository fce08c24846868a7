"""The convolution kernel against PyTorch's convolution in float64."""

import pytest
import torch
from torch.nn import functional as F


def channels_last(values, margin, padding):
    """[N, channels, length] with zeros around the positions, [N, length + padding, channels]."""
    return F.pad(values, (margin, padding - margin)).transpose(1, 2).contiguous()


@pytest.mark.parametrize(
    ("inputs", "outputs", "group", "kernel"), [(1, 16, 8, 7), (16, 32, 2, 7), (32, 16, 1, 3), (16, 16, 4, 5)]
)
@pytest.mark.parametrize("with_skip", [False, True])
def test_middle_layer(device, inputs, outputs, group, kernel, with_skip):
    from rpg.sampling.gpu.kernels.toeplitz_conv import PADDING, ToeplitzConv

    random = torch.Generator().manual_seed(0)
    count, length, margin = 2, 64, kernel // 2
    x = torch.randn(count, inputs, length, generator=random)
    weight, bias = (
        torch.randn(outputs, inputs, kernel, generator=random),
        torch.randn(outputs, generator=random),
    )
    condition, time = torch.randn(count, length, generator=random), torch.randn(length, generator=random)
    skip = torch.randn(count, outputs, length, generator=random)
    y = F.elu(F.conv1d(x.double(), weight.double(), bias.double(), padding=margin))
    expected = (y + skip.double() * with_skip + condition.double()[:, None]) * time.double()
    layer = ToeplitzConv.of(weight.to(device), bias.to(device), group, torch.float32, block_m=16, block_n=16)
    out = torch.zeros(count, length + PADDING, outputs, device=device)
    kept = torch.zeros_like(out)
    layer(
        channels_last(x, margin, PADDING).to(device), out, condition.to(device), time.to(device),
        channels_last(skip, margin, PADDING).to(device) if with_skip else None, kept,
    )  # fmt: skip
    # On a GPU float32 products are TF32.
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if device.type == "cpu" else {"atol": 5e-2, "rtol": 1e-2}
    torch.testing.assert_close(out.cpu().double(), channels_last(expected, margin, PADDING), **tolerance)
    torch.testing.assert_close(kept.cpu().double(), channels_last(y, margin, PADDING), **tolerance)


def test_last_layer(device):
    from rpg.sampling.gpu.kernels.toeplitz_conv import PADDING, ToeplitzConv

    random = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 64, generator=random)
    weight, bias = torch.randn(1, 16, 7, generator=random), torch.randn(1, generator=random)
    layer = ToeplitzConv.of(weight.to(device), bias.to(device), 16, torch.float32, block_m=16)
    out = torch.full((3, 64), torch.nan, device=device)
    layer(channels_last(x, 3, PADDING).to(device), out)
    expected = F.conv1d(x.double(), weight.double(), bias.double(), padding=3)[:, 0]
    tolerance = 1e-4 if device.type == "cpu" else 5e-2
    torch.testing.assert_close(out.cpu().double(), expected, atol=tolerance, rtol=1e-3)
