"""The validation tasks of a collection, and collections without any."""

import sys
from pathlib import Path

import pytest
import torch

from ray_jobs.validation import ValidationTasks
from rpg.collection.collection import FAMILY, Collection, Entry
from rpg.collection.statistics import LayoutStatistics
from rpg.config import ConditionKind, Config, EvaluateConfig, Normalisation
from rpg.errors import RPGError
from rpg.generator.generator import Generator

ODD = [0.0, 1.0] * 5


@pytest.mark.parametrize(
    ("architecture", "entry", "reason"),
    [
        ({}, Entry("a", "0" * 64, ODD, split="validation"), "does not say which task family"),
        ({FAMILY: "digits"}, Entry("a", "0" * 64, split="validation"), "tasks of split 'validation' that no"),
        ({FAMILY: "digits"}, Entry("a", "0" * 64, ODD, split="train"), "tasks of split 'validation' that no"),
    ],
)
def test_a_collection_without_validation_tasks_is_refused_with_a_hint(
    tmp_path: Path, architecture: dict[str, str], entry: Entry, reason: str
) -> None:
    with pytest.raises(RPGError, match=rf"{reason}.*; without validation: train\.validate_every=0"):
        ValidationTasks.of(Config(), "train", Collection(tmp_path, architecture, [entry]))


def test_tasks_of_split_validation_are_taken(tmp_path: Path) -> None:
    entries = [Entry(name, "0" * 64, ODD, split="validation") for name in "ab"]
    tasks = ValidationTasks.of(Config(), "train", Collection(tmp_path, {FAMILY: "digits"}, entries))
    assert (tasks.judge.tasks, tasks.conditions, tasks.higher_is_better) == ("digits", [ODD], True)


def test_a_generator_without_conditions_has_one_task(tmp_path: Path) -> None:
    config = Config(evaluate=EvaluateConfig(command="true {checkpoint}", higher_is_better=False))
    config.generator.condition.kind = ConditionKind.permutation
    tasks = ValidationTasks.of(config, "train", Collection(tmp_path, {}, [Entry("a", "0" * 64)]))
    assert (tasks.conditions, tasks.descriptions, tasks.higher_is_better) == (None, None, False)


FAMILY_THAT_COUNTS = """
import torch

class Counts:
    made = 0

    def __init__(self):
        type(self).made += 1

    def build_network(self):
        return torch.nn.Linear(3, 2)

    def evaluate(self, network, condition):
        return {"norm": float(network.weight.norm())}
"""


def test_a_family_is_loaded_once_for_all_validations(tmp_path: Path) -> None:
    (tmp_path / "family_that_counts.py").write_text(FAMILY_THAT_COUNTS)
    config = Config(tasks=f"{tmp_path}/family_that_counts.py:Counts")
    config.generator.condition.kind = ConditionKind.none
    tasks = ValidationTasks.of(config, "train", Collection(tmp_path, {}, [Entry("a", "0" * 64)]))
    family = sys.modules["family_that_counts"].Counts
    assert family.made == 1
    statistics = LayoutStatistics({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)})
    for i in range(2):
        statistics.update({"weight": torch.full((2, 3), float(i)), "bias": torch.full((2,), float(i))})
    layout = statistics.layout(4, Normalisation.residual)
    generator = Generator.for_collection(config.generator, layout, None, 2)
    first, second = tasks.validate(generator), tasks.validate(generator)
    assert first == second
    assert first.failure is None
    assert family.made == 2
