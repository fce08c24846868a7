"""Recomputed BatchNorm statistics, beside PyTorch's own `update_bn`."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from rpg.errors import RPGError
from rpg.evaluation.batchnorm import (
    batchnorm_modules,
    recompute_batchnorm,
    recomputed_batchnorm,
    training_batches,
)

SIZE = 12


class Family:
    def build_network(self) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5),
            nn.BatchNorm1d(5, momentum=0.3), nn.BatchNorm1d(5, track_running_stats=False),
        )  # fmt: skip

    def batch(self, size: int, random: torch.Generator) -> list[Any]:
        return [2 * torch.randn(size, 3, 8, 8, generator=random) + 1, "labels"]


class InWords(Family):
    """A family that says how its networks are run."""

    def batch(self, size: int, random: torch.Generator) -> list[Any]:
        return ["labels", super().batch(size, random)[0]]

    def outputs(self, network: nn.Module, batch: list[Any]) -> Tensor:
        result: Tensor = network(batch[1])
        return result


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def checkpoint(seed: int = 5) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {
        name: torch.rand_like(value) + 0.5 if value.is_floating_point() else value + 7
        for name, value in Family().build_network().state_dict().items()
    }


def test_statistics_are_those_of_update_bn() -> None:
    network = Family().build_network()
    network.load_state_dict(checkpoint())
    other = copy.deepcopy(network)
    batches = training_batches(Family(), "mine", seeded(), batches=5, batch_size=SIZE)
    recompute_batchnorm(network, batches)
    update_bn([batch[0] for batch in batches], other)
    for name, value in other.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], value, msg=name)
    assert not any(module.training for module in network.modules())
    assert [module.momentum for module in batchnorm_modules(network).values()] == [0.1, 0.3]


def test_nothing_but_batchnorm_is_in_training_mode() -> None:
    seen: list[bool] = []
    network = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3))
    network[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    inputs = torch.randn(64, 3, generator=seeded())
    recompute_batchnorm(network, [inputs], lambda network, batch: network(batch))
    assert seen == [False]
    torch.testing.assert_close(network.state_dict()["1.running_mean"], inputs.mean(0))
    torch.testing.assert_close(network.state_dict()["1.running_var"], inputs.var(0))


@pytest.mark.parametrize("family", [Family(), InWords()])
def test_a_checkpoint_keeps_all_but_its_statistics(family: Family) -> None:
    before = {name: value.double() if "1.running" in name else value for name, value in checkpoint().items()}
    kept = {name: value.clone() for name, value in before.items()}
    batches = training_batches(family, "mine", seeded(3), batches=4, batch_size=SIZE)
    after = recomputed_batchnorm(family, "mine", before, batches)
    assert list(after) == list(before)
    by_torch = family.build_network()
    by_torch.load_state_dict(kept)
    random = seeded(3)
    update_bn([2 * torch.randn(SIZE, 3, 8, 8, generator=random) + 1 for _ in range(4)], by_torch)
    for name, value in by_torch.state_dict().items():
        assert after[name].dtype == before[name].dtype
        torch.testing.assert_close(after[name].to(value.dtype), value, msg=name)
        assert torch.equal(before[name], kept[name])
        assert torch.equal(after[name], kept[name]) == ("running" not in name and "tracked" not in name)


def test_a_network_whose_statistics_have_other_names_is_refused() -> None:
    class Renames(Family):
        def load(self, network: nn.Module, state_dict: dict[str, Tensor]) -> None:
            network.load_state_dict({name.removeprefix("base."): v for name, v in state_dict.items()})

    batches = training_batches(Renames(), "mine", seeded(), batches=1, batch_size=SIZE)
    renamed = {f"base.{name}": value for name, value in checkpoint().items()}
    with pytest.raises(RPGError, match=r"tensor '1\.running_mean': expected shape \[4\] in the checkpoint"):
        recomputed_batchnorm(Renames(), "mine", renamed, batches)


def test_a_network_without_running_statistics_is_left_as_it_is() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert batchnorm_modules(network) == {}
