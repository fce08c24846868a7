"""Families are found by name."""

import pytest
import torch

from rpg.errors import RPGError
from rpg.tasks.families import FAMILIES, task_family


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_a_family_are_binary(name: str) -> None:
    head = task_family(name).build_network().state_dict()["head.weight"]
    assert head.shape[0] == 1
    assert head.dtype == torch.float32


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(RPGError, match=r"collect\.family: expected one of cifar10, digits, got 'digit'"):
        task_family("digit")
