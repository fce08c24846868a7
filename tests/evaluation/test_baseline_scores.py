"""What generated networks are compared with: a family's references and the best original."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rpg.collection.collection import Entry
from rpg.errors import RPGError
from rpg.evaluation.baseline_scores import Scorer, best_by_validation, best_original, references
from rpg.evaluation.judge import ACCURACY, FamilyJudge, Measurement
from rpg.evaluation.networks import Network
from rpg.evaluation.results import TaskSplit
from rpg.tasks.families import Metric

MINE = Path(__file__).parents[1] / "tasks" / "my_tasks.py"
CONDITIONS = [(1.0,), (2.5,)]


def scorer(name: str, metric: Metric = ACCURACY, split: str = "test") -> Scorer:
    return Scorer(FamilyJudge(f"{MINE}:{name}", time_limit=30.0), metric, split, str)


def networks(scorer: Scorer) -> list[Network]:
    torch.manual_seed(3)
    assert isinstance(scorer.judge, FamilyJudge)
    family = scorer.judge.family
    return [
        Network(f"n{i}", condition, TaskSplit.unseen, family.build_network().state_dict())
        for i, condition in enumerate(CONDITIONS)
    ]


def test_a_reference_has_the_accuracy_of_what_it_answers() -> None:
    mine = scorer("Referenced")
    asked = networks(mine)
    backbone = asked[0].state_dict
    found = references(mine, lambda: backbone, asked, ["centre"])
    inputs = torch.linspace(-2, 2, 64)
    assert isinstance(mine.judge, FamilyJudge)
    plain = mine.judge.family.build_network().eval()
    plain.load_state_dict(backbone)
    with torch.no_grad():
        answers = plain(inputs[:, None])[:, 0] > 0
    for condition in CONDITIONS:
        right = torch.sin(condition[0] * inputs) > 0
        accuracy = (answers == right).float().mean().item()
        assert found["the backbone"][str(condition)] == pytest.approx(accuracy)
    assert found["all wrong"] == {str(condition): 0.0 for condition in CONDITIONS}
    assert mine.left_out == []


def missing() -> dict[str, Tensor]:
    raise RPGError("backbone.safetensors: not found")


def test_references_are_left_out_with_their_reason() -> None:
    mine = scorer("Referenced")
    asked = networks(mine)
    for taken, metric, read, reason in (
        ([], ACCURACY, missing, "references: backbone.safetensors: not found"),
        ([], Metric("mse"), missing, "they have an accuracy, and the report is about mse"),
        (["all wrong"], ACCURACY, lambda: asked[0].state_dict, "'all wrong' is the name of a baseline"),
        ([], ACCURACY, lambda: {"odd": torch.zeros(1)}, "references: RuntimeError: "),
    ):
        one = Scorer(mine.judge, metric, "test", str)
        assert references(one, read, asked, taken) == {}
        assert len(one.left_out) == 1
        assert reason in one.left_out[0]
    failing = scorer("FailingReferences")
    assert references(failing, lambda: asked[0].state_dict, asked, []) == {}
    assert "references: 'short': expected a tensor [64], got [3]" in failing.left_out[0]


def test_a_family_without_references_is_not_asked() -> None:
    mine = scorer("Answers")
    assert references(mine, missing, networks(mine), []) == {}
    assert mine.left_out == []


def entry(name: str, condition: list[float] | None, **metrics: float) -> Entry:
    return Entry(name, "0", condition, metrics)


def test_the_best_is_found_by_what_was_recorded_on_validation_data() -> None:
    entries = [
        entry("a", [1.0], validation_mse=3.0, mse=0.0),
        entry("b", [1.0], validation_mse=2.0, mse=1.0),
        entry("c", [1.0], validation_mse=2.0, mse=0.5),
        entry("d", [2.0], validation_mse=5.0),
        entry("e", [2.0]),
        entry("f", [3.0]),
    ]
    lowest = best_by_validation(entries, Metric("mse", higher_is_better=False))
    assert [each.file for each in lowest] == ["b", "d"]
    assert [each.file for each in best_by_validation(entries, Metric("mse"))] == ["a", "d"]
    alone = [entry("a", None, validation_mse=1.0), entry("b", None, validation_mse=2.0)]
    assert [each.file for each in best_by_validation(alone, Metric("mse"))] == ["b"]
    assert best_by_validation([entry("a", None)], ACCURACY) == []
    with pytest.raises(RPGError, match="no checkpoint has a metric 'validation_accuracy'; recorded are vali"):
        best_by_validation(entries, ACCURACY)


def test_the_best_original_is_measured_once() -> None:
    mine = scorer("Answers")
    first, second = networks(mine)
    found = best_original(mine, lambda _: [first, second], {"n0": Measurement({"accuracy": 0.25})})
    assert found["best_original"][str(CONDITIONS[0])] == 0.25
    inputs = torch.linspace(-2, 2, 64)
    assert isinstance(mine.judge, FamilyJudge)
    plain = mine.judge.family.build_network().eval()
    plain.load_state_dict(second.state_dict)
    with torch.no_grad():
        right = (plain(inputs[:, None])[:, 0] > 0) == (torch.sin(2.5 * inputs) > 0)
    assert found["best_original"][str(CONDITIONS[1])] == pytest.approx(right.float().mean().item())


def test_the_best_original_is_left_out_where_it_was_chosen_by_the_same_data() -> None:
    mine = scorer("Answers", split="validation")
    assert best_original(mine, lambda _: networks(mine), {}) == {}
    assert mine.left_out == ["best original: it is chosen by the validation data, which the report is of"]
