"""The validation tasks of a collection, and collections without any."""

from pathlib import Path

import pytest

from ray_jobs.validation import ValidationTasks
from rpg.collection.collection import FAMILY, Collection, Entry
from rpg.config import ConditionKind, Config, EvaluateConfig
from rpg.errors import RPGError

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
        ValidationTasks.of(Config(), Collection(tmp_path, architecture, [entry]))


def test_tasks_of_split_validation_are_taken(tmp_path: Path) -> None:
    entries = [Entry(name, "0" * 64, ODD, split="validation") for name in "ab"]
    tasks = ValidationTasks.of(Config(), Collection(tmp_path, {FAMILY: "digits"}, entries))
    assert (tasks.judge.tasks, tasks.conditions, tasks.higher_is_better) == ("digits", [ODD], True)


def test_a_generator_without_conditions_has_one_task(tmp_path: Path) -> None:
    config = Config(evaluate=EvaluateConfig(command="true {checkpoint}", higher_is_better=False))
    config.generator.condition.kind = ConditionKind.permutation
    tasks = ValidationTasks.of(config, Collection(tmp_path, {}, [Entry("a", "0" * 64)]))
    assert (tasks.conditions, tasks.descriptions, tasks.higher_is_better) == (None, None, False)
