"""Task families as judges: metrics beside plain PyTorch, and failures in a line that names the network."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn

from rpg.errors import RPGError
from rpg.evaluation.batchnorm import BATCH_SIZE, BATCHES
from rpg.evaluation.judge import (
    ACCURACY,
    Candidate,
    FamilyJudge,
    Measurement,
    finite_metrics,
    metric_that_counts,
    with_metric,
    within,
)
from rpg.tasks.families import Metric

MINE = Path(__file__).parents[1] / "tasks" / "my_tasks.py"


def judge(name: str, time_limit: float = 30.0) -> FamilyJudge:
    return FamilyJudge(f"{MINE}:{name}", time_limit=time_limit)


def candidates(family: FamilyJudge, number: int = 3) -> list[Candidate]:
    torch.manual_seed(1)
    return [Candidate(f"n{i}", family.family.build_network().state_dict(), [1.0 + i]) for i in range(number)]


def outputs(network: Candidate) -> Tensor:
    module = sys.modules["my_tasks"]
    plain = module.Net().eval()
    plain.load_state_dict(network.state_dict)
    with torch.no_grad():
        result: Tensor = plain(module.INPUTS)[:, 0]
    return result


def test_a_minimal_family_measures_and_its_first_metric_counts() -> None:
    family = judge("Minimal")
    networks = candidates(family)
    measured = family.measure(networks, "test")
    inputs = sys.modules["my_tasks"].INPUTS[:, 0]
    for network, found in zip(networks, measured, strict=True):
        assert isinstance(network.asked, list)
        wanted = torch.sin(network.asked[0] * inputs)
        error = (outputs(network) - wanted).square().mean().item()
        assert found.metrics == {"mse": pytest.approx(error), "largest": 1.0}
        assert (found.wrong, found.failure) == (None, None)
    assert metric_that_counts(family, measured) == Metric("mse")
    assert family.majority([1.0], "test") is None


def test_predictions_give_wrong_answers_beside_the_familys_own_metrics() -> None:
    family = judge("Sines")
    networks = candidates(family)
    measured = family.measure(networks, "test")
    inputs = sys.modules["my_tasks"].INPUTS[:, 0]
    for network, found in zip(networks, measured, strict=True):
        assert isinstance(network.asked, list)
        right = torch.sin(network.asked[0] * inputs) > 0
        assert found.wrong is not None
        assert found.wrong.tolist() == ((outputs(network) > 0) != right).tolist()
        assert found.answers is not None
        assert found.answers.equal(outputs(network) > 0)
    assert metric_that_counts(family, measured) == Metric("mse", higher_is_better=False, unit="V²")
    assert family.majority([1.0], "test") == 0.5


def test_batchnorm_is_recomputed_on_the_same_data_for_every_network() -> None:
    family = judge("Referenced")
    assert family.can_recompute_batchnorm
    assert not judge("Answers").can_recompute_batchnorm
    networks = candidates(family)
    odd = Candidate("odd", {"weight": torch.zeros(3)}, [1.0])
    done, failures = family.with_batchnorm_recomputed([*networks, odd], seed=4)
    assert [each.name for each in done] == ["n0", "n1", "n2"]
    assert [line.partition(":")[0] for line in failures] == ["odd"]
    random = torch.Generator().manual_seed(4)
    inputs = [family.family.batch(BATCH_SIZE, random)[0] for _ in range(BATCHES)]
    for network, after in zip(networks, done, strict=True):
        module = sys.modules["my_tasks"].Net()
        module.load_state_dict(network.state_dict)
        update_bn(inputs, module)
        torch.testing.assert_close(after.state_dict, module.state_dict())
    again, _ = family.with_batchnorm_recomputed(networks[1:2], seed=4)
    assert again[0].state_dict["layers.1.running_mean"].equal(done[1].state_dict["layers.1.running_mean"])


def test_answers_alone_give_the_accuracy() -> None:
    family = judge("Answers")
    [found] = family.measure(candidates(family, 1), "test")
    assert found.wrong is not None
    assert found.metrics == {"accuracy": pytest.approx(1 - found.wrong.mean())}
    assert family.metrics == (ACCURACY,)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Fails", r"n1: .*Fails: evaluate: ValueError: no luck \(my_tasks\.py, line [0-9]+\)"),
        ("Nan", r"n1: .*Nan: evaluate: metric 'mse': expected a finite number, got nan"),
        ("Text", r"n1: .*Text: evaluate: expected metrics by name, got 'good'"),
        ("OtherMetric", r"n1: .*OtherMetric: evaluate: metric 'mse' is missing"),
        ("Shape", r"n1: .*Shape: predict: expected a tensor \[inputs\], got \[64, 1\]"),
        ("Short", r"n1: .*Short: expected as many answers as labels, got 64 and 3"),
        ("NeedsGpu", r"n1: .*NeedsGpu: evaluate: RuntimeError: No CUDA GPUs are available"),
    ],
)
def test_what_goes_wrong_names_the_network_and_the_familys_code(name: str, reason: str) -> None:
    family = judge(name)
    measured = family.measure(candidates(family), "test")
    failure = measured[1].failure
    assert failure is not None
    assert re.match(reason, failure), failure
    assert measured[1].metrics == {}


def test_one_network_that_does_not_fit_does_not_spoil_the_others() -> None:
    family = judge("Sines")
    networks = candidates(family)
    networks[1] = Candidate("odd", {"weight": torch.zeros(3)}, [1.0])
    measured = family.measure(networks, "test")
    assert [each.failure is None for each in measured] == [True, False, True]
    assert "odd: " in str(measured[1].failure)


def test_a_family_that_hangs_is_left_behind() -> None:
    family = judge("Hangs", time_limit=0.2)
    began = time.monotonic()
    [found] = family.measure(candidates(family, 1), "test")
    assert "n0: " in str(found.failure)
    assert "took longer than evaluate.time_limit = 0.2 s" in str(found.failure)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("hanging", [(7,), (0,), (0, 7), tuple(range(100))])
def test_answers_that_hang_cost_the_time_limit_a_few_times_and_not_once_a_network(
    hanging: tuple[int, ...],
) -> None:
    family = judge("HangsLater", time_limit=1.0)
    networks = candidates(family, 100)
    for i in hanging:
        networks[i].state_dict["layers.3.bias"].fill_(1.0)
    began = time.monotonic()
    measured = family.measure(networks, "test")
    assert time.monotonic() - began < 20
    for i in hanging:
        assert str(measured[i].failure).startswith(f"n{i}: ")
        assert "took longer than" in str(measured[i].failure)
    # The first one alone is known to hang, or to answer.
    assert (measured[0].failure is None) == (0 not in hanging)
    if hanging == (0,):
        assert [each.failure for each in measured[1:]] == [None] * 99


def test_a_familys_own_load_never_meets_the_network_before() -> None:
    family = judge("LoadsSome")
    first, second = candidates(family, 2)
    partial = {name: value for name, value in second.state_dict.items() if "3" not in name}
    measured = family.measure([first, Candidate("partial", partial, [1.0])], "test")
    assert measured[0].metrics["bias"] == pytest.approx(first.state_dict["layers.3.bias"].item())
    assert measured[1].metrics["bias"] != measured[0].metrics["bias"]


def test_split_is_told_by_name_and_a_program_that_ends_itself_is_a_failure() -> None:
    family = judge("KeywordSplit")
    assert family.measure(candidates(family, 1), "validation")[0].metrics == {"validation": 1.0}
    ends = judge("Exits").measure(candidates(family, 1), "test")
    assert "evaluate: SystemExit" in str(ends[0].failure)


def test_a_network_that_lacks_the_metric_that_counts_is_a_failure() -> None:
    rows = [Measurement({"a": 1.0}), Measurement({"b": 1.0}), Measurement({}, None, "x: odd")]
    found = with_metric(Metric("a"), ["m0", "m1", "m2"], rows)
    assert [each.failure for each in found] == [None, "m1: metric 'a' is missing", "x: odd"]


def test_a_call_gives_its_result_or_its_error() -> None:
    assert within(10, lambda: 3, "call") == 3
    with pytest.raises(ZeroDivisionError):
        within(10, lambda: 1 // 0, "call")


@pytest.mark.parametrize("value", [float("inf"), "3", None, True, [1.0], 10**400, torch.zeros(2)])
def test_metrics_are_finite_numbers(value: object) -> None:
    assert finite_metrics({"a": torch.tensor(2.5), "b": 3}, "x") == {"a": 2.5, "b": 3.0}
    with pytest.raises(RPGError, match="x: metric 'a': expected a finite number"):
        finite_metrics({"a": value}, "x")
