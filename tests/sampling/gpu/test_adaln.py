"""The modulation kernels against the equations in PyTorch, in float64."""

import pytest
import torch
from torch.nn import functional as F


def inputs(width, device):
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(5, width, generator=random) for _ in range(2)]
    modulation = torch.randn(5, 4 * width, generator=random)
    by_time = torch.randn(4 * width, generator=random)
    return [value.to(device) for value in (*values, modulation, by_time)]


def modulated(x, modulation, by_time, shift, width):
    total = modulation.double() + by_time.double()
    normal = F.layer_norm(x.double(), (width,))
    return normal * (1 + total[:, shift + width : shift + 2 * width]) + total[:, shift : shift + width]


@pytest.mark.parametrize("width", [16, 96, 256])
def test_normalise_modulate(device, width):
    from rpg.sampling.gpu.kernels.adaln import normalise_modulate

    x, _, modulation, by_time = inputs(width, device)
    out = torch.full_like(x, torch.nan)
    normalise_modulate(x, modulation, by_time, width, out)
    torch.testing.assert_close(
        out.double(), modulated(x, modulation, by_time, width, width), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("width", [16, 96, 256])
def test_add_gated(device, width):
    from rpg.sampling.gpu.kernels.adaln import add_gated_normalise_modulate

    x, branch, modulation, by_time = inputs(width, device)
    gate = (modulation.double() + by_time.double())[:, :width]
    expected = x.double() + gate * branch.double()
    out = torch.full_like(x, torch.nan)
    add_gated_normalise_modulate(x, branch, modulation, by_time, 0, 2 * width, out)
    torch.testing.assert_close(x.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        out.double(), modulated(expected, modulation, by_time, 2 * width, width), atol=1e-4, rtol=1e-4
    )
