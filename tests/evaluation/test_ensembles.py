"""Ensembles beside votes that are counted one by one."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpg.evaluation.ensembles import (
    MOST_ENSEMBLES,
    Vote,
    averaged_vote,
    choices,
    ensembles,
    majority_is_wrong,
)
from rpg.evaluation.results import Evaluated, TaskSplit


def network(task: str, answers: torch.Tensor, right: torch.Tensor) -> Evaluated:
    wrong = (answers != right).numpy()
    return Evaluated("n", task, TaskSplit.unseen, 1 - float(wrong.mean()), wrong, answers=answers)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3, 5, 7]), st.integers(1, 30), st.integers(2, 6))
def test_the_majority_is_counted_input_by_input(seed: int, number: int, inputs: int, classes: int) -> None:
    random = np.random.default_rng(seed)
    answers, right = random.integers(0, classes, (number, inputs)), random.integers(0, classes, inputs)
    expected = []
    for column, wanted in zip(answers.T, right, strict=True):
        counted = Counter(column.tolist())
        most = max(counted.values())
        expected.append(min(answer for answer, count in counted.items() if count == most) != wanted)
    found = majority_is_wrong(torch.tensor(answers), torch.tensor(answers != right))
    assert found.tolist() == expected
    if classes == 2:
        booleans = torch.tensor(answers).bool()
        assert majority_is_wrong(booleans, torch.tensor(answers != right)).tolist() == expected


@given(st.integers(1, 200), st.integers(1, 200))
def test_choices_favour_no_network(networks: int, size: int) -> None:
    size = min(size, networks)
    chosen = choices(networks, size)
    assert 1 <= len(chosen) <= MOST_ENSEMBLES
    assert all(len(set(some)) == size and set(some) <= set(range(networks)) for some in chosen)
    taken = Counter(index for some in chosen for index in some)
    if networks <= MOST_ENSEMBLES:
        assert len(taken) == networks
        assert len(set(taken.values())) == 1
    assert chosen == choices(networks, size)


def test_three_that_err_apart_are_right_together_and_copies_gain_nothing() -> None:
    right = torch.tensor([0, 1, 2, 3, 4, 5])
    apart = [torch.where(torch.arange(6) // 2 == i, 9, right) for i in range(3)]
    originals = [network("t", answers, right) for answers in apart]
    copies = [network("t", apart[0], right)] * 4
    found = ensembles(originals, copies)
    assert found is not None
    assert found.size == 3
    assert found.originals["t"] == Vote(1.0, pytest.approx(2 / 3))
    assert found.generated["t"] == Vote(pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_size_is_the_same_for_all_tasks_and_tasks_of_few_networks_are_left_out() -> None:
    right = torch.tensor([True, False])
    one = {task: network(task, right, right) for task in "abc"}
    unknown = Evaluated("n", "c", TaskSplit.unseen, 1.0)
    originals = [one["a"]] * 8 + [one["b"]] * 9 + [one["c"]] * 2 + [unknown]
    generated = [one["a"]] * 20 + [one["b"]] * 6 + [one["c"]] * 5
    found = ensembles(originals, generated)
    assert found is not None
    assert found.size == 5
    assert set(found.originals) == set(found.generated) == {"a", "b"}
    assert ensembles(originals, [one["c"]] * 5) is None
    assert ensembles([], []) is None


def test_an_ensemble_is_averaged_over_all_choices_of_its_members() -> None:
    random = torch.Generator().manual_seed(1)
    right = torch.randint(0, 3, (40,), generator=random)
    networks = [network("t", torch.randint(0, 3, (40,), generator=random), right) for _ in range(5)]
    accuracies = []
    for left, other in ((i, j) for i in range(5) for j in range(i)):
        members = [n for k, n in enumerate(networks) if k not in (left, other)]
        votes = torch.stack([n.answers for n in members if n.answers is not None]).mode(0).values
        accuracies.append((votes == right).double().mean().item())
    vote = averaged_vote(networks, 3)
    assert vote.accuracy == pytest.approx(np.mean(accuracies))
    assert vote.members == pytest.approx(np.mean([n.score for n in networks]))
