"""The layer that rounds its weight twice, against PyTorch's own under autocast."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from rpg.generator.recurrent.rounded_weight import linear


def passes(apply, autocast, input_gradient=True):
    """Output and gradients, and the shapes and types that autograd kept."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=False)
    x = torch.randn(2, 5, 24, requires_grad=input_gradient)
    kept = []

    def pack(tensor):
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, autocast):
        out = apply(layer, x)
    out.float().square().sum().backward()
    return [out.detach(), layer.weight.grad, *([x.grad] if input_gradient else [])], kept


@pytest.mark.parametrize("input_gradient", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_same_output_and_gradients(autocast, input_gradient):
    found, _ = passes(linear, autocast, input_gradient)
    expected, _ = passes(lambda layer, x: layer(x), autocast, input_gradient)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_rounded_weight_is_not_kept():
    def rounded(kept):
        return [each for each in kept if each[1] == torch.bfloat16 and set(each[0]) == {24, 40}]

    assert rounded(passes(lambda layer, x: layer(x), True)[1]), "autograd keeps it otherwise"
    assert not rounded(passes(linear, True)[1])


def test_gradients_against_differences():
    torch.manual_seed(0)
    layer = nn.Linear(3, 4, bias=False)
    x = torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(layer, x)
    out.sum().backward()
    # d sum(x Wᵀ) / dW has the rounded inputs' sums in every row.
    expected = x.bfloat16().float().sum(0).expand(4, 3)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-2, atol=1e-2)


def test_without_gradients_nothing_changes():
    layer, x = nn.Linear(24, 40, bias=False), torch.randn(5, 24)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear(layer, x), F.linear(x, layer.weight), rtol=0, atol=0)
