"""Groups of axes: a network whose units are permuted computes the same, and no order that matters is free."""

from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.collection.alignment import permuted
from rpg.collection.permutation_groups import AxisOfTensor, PermutationGroup, permutation_groups
from rpg.errors import RPGError
from rpg.tasks.cifar10_net import Cifar10Net
from rpg.tasks.digits import DigitsNet


class Residual(nn.Module):
    """A block whose input and output units are the same."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class Ordered(nn.Module):
    """The second layer's units have an order: each gets the sum of those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(self.second(self.first(x).relu()).cumsum(1))
        return out


def with_statistics(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, BatchNorm's statistics and norms' weights other than at the start."""
    for module in network.modules():
        for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "running_var" or (value.ndim == 1 and name == "weight"):
                nn.init.uniform_(value, 0.5, 2.0)
            elif value.ndim == 1 and value.is_floating_point():
                nn.init.normal_(value)
    return network.eval()


def check_that_it_computes_the_same(network: nn.Module, inputs: Tensor) -> list[PermutationGroup]:
    groups = permutation_groups(network, lambda each: each(inputs))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        answers = network(inputs)
    orders = [torch.randperm(group.size).roll(1) for group in groups]
    after = permuted(before, groups, orders)
    network.load_state_dict(after, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(
            network(inputs), answers, rtol=1e-4, atol=1e-5 * float(answers.abs().max())
        )
    network.load_state_dict(before)
    return groups


@pytest.mark.parametrize(
    ("build", "size", "units"),
    [(Cifar10Net, (3, 32, 32), [32, 48, 48, 64]),
     (lambda: DigitsNet(outputs=10), (1, 8, 8), [12, 24]),
     # The stem and the blocks' sums are one group a stage, and each block has one within.
     (lambda: torchvision.models.resnet18(num_classes=10), (3, 64, 64),
      [64] * 3 + [128] * 3 + [256] * 3 + [512] * 3),
     (lambda: timm.create_model("convnext_atto", num_classes=10), (3, 32, 32),
      [40, 80, 160, 320] + [160] * 2 + [320] * 2 + [640] * 6 + [1280] * 2),
     # Heads keep the order of their values: free are the residual stream and the hidden layers of the MLPs.
     (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=10),
      (3, 32, 32), [192, 768, 768])],
)  # fmt: skip
def test_known_networks(build: Callable[[], nn.Module], size: tuple[int, ...], units: list[int]) -> None:
    torch.manual_seed(0)
    network = with_statistics(build())
    groups = check_that_it_computes_the_same(network, torch.randn(2, *size))
    assert sorted(group.size for group in groups) == sorted(units)


def test_squeeze_and_excitation_and_depthwise_convolutions() -> None:
    torch.manual_seed(0)
    network = with_statistics(timm.create_model("mobilenetv3_small_050", num_classes=10))
    groups = check_that_it_computes_the_same(network, torch.randn(1, 3, 64, 64))
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    moved = {axis.tensor for group in groups for axis in group.axes if axis.dimension == 0}
    # The outputs of every convolution can be permuted.
    weights = {f"{n}.weight" for n, m in network.named_modules() if any(m is each for each in convolutions)}
    assert weights <= moved


def test_a_flattened_map_moves_in_blocks() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 9), nn.Linear(9, 2)
    )
    groups = check_that_it_computes_the_same(network, torch.randn(2, 1, 6, 6))
    assert groups == [
        PermutationGroup(
            6, (AxisOfTensor("0.weight", 0), AxisOfTensor("0.bias", 0), AxisOfTensor("3.weight", 1, 16))
        ),
        PermutationGroup(
            9, (AxisOfTensor("3.weight", 0), AxisOfTensor("3.bias", 0), AxisOfTensor("4.weight", 1))
        ),
    ]


def test_units_whose_order_matters_are_left() -> None:
    groups = check_that_it_computes_the_same(Ordered(), torch.randn(3, 4))
    assert [{axis.tensor for axis in group.axes} for group in groups] == [
        {"first.weight", "first.bias", "second.weight"}
    ]


@given(
    st.lists(st.sampled_from(["linear", "residual", "tanh", "norm", "softmax", "sum"]), max_size=8), st.data()
)
@settings(max_examples=40, deadline=None)
def test_any_stack_of_layers_computes_the_same(kinds: list[str], data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 100)))
    width = data.draw(st.integers(2, 6))
    layers: list[nn.Module] = [nn.Linear(3, width)]
    for kind in kinds:
        if kind == "linear":
            after = data.draw(st.integers(2, 6))
            layers.append(nn.Linear(width, after))
            width = after
        elif kind == "residual":
            layers.append(Residual(width, data.draw(st.integers(2, 6))))
        else:
            layers.append({"tanh": nn.Tanh(), "norm": nn.LayerNorm(width), "softmax": nn.Softmax(-1),
                           "sum": nn.Hardtanh()}[kind])  # fmt: skip
    layers.append(nn.Linear(width, 2))
    network = with_statistics(nn.Sequential(*layers))
    groups = check_that_it_computes_the_same(network, torch.randn(4, 3))
    # All hidden units of these are free.
    assert len(groups) >= 1 + kinds.count("linear") + kinds.count("residual")


def test_a_network_that_cannot_be_traced_is_told() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("no such luck")

    with pytest.raises(RPGError, match=r"operations cannot be traced: .*no such luck"):
        permutation_groups(Branching(), lambda network: network(torch.zeros(1)))
