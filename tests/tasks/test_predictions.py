"""Answers of many networks at once are those of each alone."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import stack_module_state

from rpg.errors import RPGError
from rpg.tasks import predictions
from rpg.tasks.families import load_family
from rpg.tasks.predictions import predict_all

MINE = Path(__file__).parent / "my_tasks.py"


def networks(family: Any, number: int) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    made = [family.build_network().state_dict() for _ in range(number)]
    for state_dict in made:
        state_dict["layers.1.running_mean"] += torch.randn(8)
    return made


def alone(state_dicts: list[dict[str, Tensor]]) -> Tensor:
    module = sys.modules["my_tasks"]
    rows = []
    for state_dict in state_dicts:
        network = module.Net().eval()
        network.load_state_dict(state_dict)
        with torch.no_grad():
            rows.append(network(module.INPUTS)[:, 0] > 0)
    return torch.stack(rows)


@pytest.mark.parametrize("name", ["Answers", "Branching", "Fickle"])
def test_answers_side_by_side_are_those_of_each_network_alone(name: str) -> None:
    family = load_family(f"{MINE}:{name}")
    made = networks(family, 20)
    assert predict_all(family, name, made, "test").equal(alone(made))


def test_networks_run_side_by_side_where_they_can() -> None:
    family = load_family(f"{MINE}:Fickle")
    type(family).calls = 0
    predict_all(family, "Fickle", networks(family, 20), "test")
    # One attempt for all sixteen of a group, whose first network answers otherwise alone; then each alone.
    assert type(family).calls == 1 + 1 + 20


@pytest.mark.parametrize(("bound", "groups"), [(2**28, [16, 4]), (3, [3] * 6 + [2]), (1, []), (0, [])])
def test_as_many_networks_run_side_by_side_as_their_weights_allow(
    bound: int, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(f"{MINE}:Answers")
    made = networks(family, 20)
    size = sum(value.nbytes for value in made[0].values())
    monkeypatch.setattr(predictions, "_BYTES_SIDE_BY_SIDE", bound if bound == 2**28 else bound * size)
    stacked = []

    def stack(modules: list[torch.nn.Module]) -> Any:
        stacked.append(len(modules))
        return stack_module_state(modules)

    monkeypatch.setattr(predictions, "stack_module_state", stack)
    assert predict_all(family, "Answers", made, "test").equal(alone(made))
    assert stacked == groups


def test_answers_of_another_shape_and_networks_that_do_not_fit_are_refused() -> None:
    family = load_family(f"{MINE}:Shape")
    with pytest.raises(RPGError, match=r"Shape: predict: expected a tensor \[inputs\], got \[64, 1\]"):
        predict_all(family, "Shape", networks(family, 2), "test")
    other = [{"weight": torch.zeros(2)}]
    with pytest.raises(RPGError, match=r"Shape: load: RuntimeError: .*Missing key"):
        predict_all(family, "Shape", other, "test")
