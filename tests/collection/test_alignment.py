"""Weight matching: against all orders of a small layer, and on networks that are permuted copies."""

from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor, nn

from rpg.collection.alignment import aligned, permuted
from rpg.collection.permutation_groups import permutation_groups
from rpg.errors import RPGError
from rpg.tasks.cifar10_net import Cifar10Net


def mlp(seed: int, *widths: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).eval()


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return float(sum((one[name] - other[name]).square().sum() for name in one))


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_one_layer_is_the_best_of_all_orders(seed: int) -> None:
    network, reference = mlp(seed, 3, 5, 2), mlp(seed + 100, 3, 5, 2).state_dict()
    groups = permutation_groups(network, lambda each: each(torch.randn(2, 3)))
    state = network.state_dict()
    found = aligned(state, reference, groups, list(state), 0)
    every = [permuted(state, groups, [torch.tensor(order)]) for order in permutations(range(5))]
    assert distance(found, reference) == pytest.approx(min(distance(each, reference) for each in every))


@pytest.mark.parametrize("seed", range(3))
def test_a_permuted_copy_becomes_the_original(seed: int) -> None:
    torch.manual_seed(seed)
    network = Cifar10Net().eval()
    groups = permutation_groups(network, lambda each: each(torch.randn(2, 3, 32, 32)))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for name, value in state.items():
        if name.endswith(("running_mean", "running_var")):
            value.uniform_(0.5, 2.0)
    copy = permuted(state, groups, [torch.randperm(group.size) for group in groups])
    assert not copy["conv2.weight"].equal(state["conv2.weight"])
    parameters = [name for name, _ in network.named_parameters()]
    found = aligned(copy, state, groups, parameters, seed)
    # Buffers, which were not compared, come into order with the parameters.
    assert all(found[name].equal(state[name]) for name in state)


def test_aligning_never_moves_a_network_away() -> None:
    reference = mlp(0, 4, 12, 9, 3).state_dict()
    for seed in range(1, 6):
        network = mlp(seed, 4, 12, 9, 3)
        groups = permutation_groups(network, lambda each: each(torch.randn(2, 4)))
        state = network.state_dict()
        found = aligned(state, reference, groups, list(state), seed)
        assert distance(found, reference) < distance(state, reference)
        again = aligned(found, reference, groups, list(state), seed)
        assert distance(again, reference) <= distance(found, reference) + 1e-6


def test_a_checkpoint_of_another_network_is_refused() -> None:
    network = mlp(0, 3, 5, 2)
    groups = permutation_groups(network, lambda each: each(torch.randn(2, 3)))
    with pytest.raises(RPGError, match=r"tensor '0\.weight': not the one of the network"):
        aligned(mlp(0, 3, 6, 2).state_dict(), network.state_dict(), groups, ["0.weight"], 0)
    with pytest.raises(RPGError, match=r"tensor '0\.weight': not the one of the network"):
        aligned({}, network.state_dict(), groups, ["0.weight"], 0)
