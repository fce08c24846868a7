"""`autocast_linear`, which rounds its weight twice, against PyTorch's own layer under autocast."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rpg.generator.recurrent.mamba2 import autocast_linear

Kept = list[tuple[tuple[int, ...], torch.dtype]]


def plain(layer: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = layer(x)
    return out


def passes(
    apply: Callable[[nn.Linear, Tensor], Tensor],
    autocast: bool = True,
    input_gradient: bool = True,
    shape: tuple[int, ...] = (2, 5),
    dtype: torch.dtype = torch.float32,
) -> tuple[list[Tensor], Kept]:
    """Output and gradients, and the shapes and types that autograd kept."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=False, dtype=dtype)
    x = torch.randn(*shape, 24, dtype=dtype, requires_grad=input_gradient)
    kept: Kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with (
        saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = apply(layer, x)
    torch.autograd.backward(out.float().square().sum())
    gradients = [layer.weight.grad, x.grad]
    return [out.detach(), *(each for each in gradients if each is not None)], kept


@pytest.mark.parametrize("shape", [(2, 5), (7,), ()])
@pytest.mark.parametrize("input_gradient", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_output_and_gradients_are_those_of_the_plain_layer(
    autocast: bool, input_gradient: bool, shape: tuple[int, ...]
) -> None:
    found, _ = passes(autocast_linear, autocast, input_gradient, shape)
    expected, _ = passes(plain, autocast, input_gradient, shape)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_double_precision_is_not_rounded() -> None:
    found, expected = (passes(apply, dtype=torch.float64)[0] for apply in (autocast_linear, plain))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert found[0].dtype == torch.float64


def test_the_rounded_weight_is_not_kept() -> None:
    def rounded(kept: Kept) -> Kept:
        return [each for each in kept if each[1] == torch.bfloat16 and set(each[0]) == {24, 40}]

    assert rounded(passes(plain)[1]), "autograd keeps it otherwise"
    assert not rounded(passes(autocast_linear)[1])
