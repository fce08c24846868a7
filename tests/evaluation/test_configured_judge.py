"""What measures: the command, or else the family that is named, or else the collection's own."""

from pathlib import Path

import pytest
import torch

from rpg.collection.collection import FAMILY, Collection
from rpg.collection.companions import Companions
from rpg.config import JudgeConfig
from rpg.errors import RPGError
from rpg.evaluation.command_judge import CommandJudge
from rpg.evaluation.configured_judge import configured_judge, family_that_measures
from rpg.evaluation.judge import Candidate, FamilyJudge
from rpg.tasks.families import Metric

MINE = f"{Path(__file__).parents[1] / 'tasks' / 'my_tasks.py'}:Minimal"


def test_a_command_comes_before_a_family_and_a_named_family_before_the_collections(tmp_path: Path) -> None:
    digits, unnamed = Collection(tmp_path, {FAMILY: "digits"}, []), Collection(tmp_path, {}, [])
    command = JudgeConfig(command="true {checkpoint}")
    assert family_that_measures(MINE, command, digits) == ""
    assert family_that_measures(MINE, JudgeConfig(), digits) == MINE
    assert family_that_measures("", JudgeConfig(), digits) == "digits"
    with pytest.raises(RPGError, match="does not say which task family"):
        family_that_measures("", JudgeConfig(), unnamed)
    with pytest.raises(RPGError, match="tasks: expected a task family"):
        family_that_measures("", JudgeConfig(), None)


def test_a_command_has_its_settings(tmp_path: Path) -> None:
    config = JudgeConfig(
        "sh -c 'pwd >&2; ls $1 >&2; exit 1' sh {checkpoint}", str(tmp_path), "loss", False, 9.0
    )
    companions = Companions({"config.json": b"{}"})
    judge = configured_judge("", config, companions=companions, shares_gpu=True)
    assert isinstance(judge, CommandJudge)
    assert judge.metrics == (Metric("loss", higher_is_better=False),)
    assert (judge.at_once, judge.time_limit, judge.directory) == (1, 9.0, str(tmp_path))
    [found] = judge.measure([Candidate("n", {"w": torch.zeros(1)}, None)], "test")
    assert "model.safetensors" in str(found.failure)


def test_a_family_has_the_time_limit() -> None:
    judge = configured_judge(MINE, JudgeConfig(time_limit=3.0))
    assert isinstance(judge, FamilyJudge)
    assert judge.name == MINE
