"""Measuring networks whose answers are known: linear classifiers, evaluated by hand beside it."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from rpg.collection.statistics import LayoutStatistics
from rpg.config import Normalisation
from rpg.evaluation.measure import Network, TrainingSet, flatten, measure, unflatten
from rpg.evaluation.results import TaskSplit

IMAGES = torch.randn(80, 6, generator=torch.Generator().manual_seed(3))
CONDITIONS = [tuple(map(float, bits)) for bits in itertools.product((0, 1), repeat=3)][1:-1]
UNSEEN = CONDITIONS[-1]
BASIS = torch.randn(3, 6, generator=torch.Generator().manual_seed(4))


def right_weights(condition):
    return torch.tensor(condition) @ BASIS - BASIS.mean(0)


def network(condition, noise, seed):
    random = torch.Generator().manual_seed(seed)
    weights = right_weights(condition) + noise * torch.randn(6, generator=random)
    return {"weight": weights, "steps": torch.tensor(7)}


def answers(state_dicts):
    return torch.stack([IMAGES @ state_dict["weight"] > 0 for state_dict in state_dicts])


def right_answers(conditions):
    return torch.stack([IMAGES @ right_weights(condition) > 0 for condition in conditions])


@pytest.fixture(scope="module")
def measured():
    seen = [c for c in CONDITIONS if c != UNSEEN]
    trained = [(c, network(c, 0.05, 10 * i + copy)) for i, c in enumerate(seen) for copy in range(3)]
    statistics = LayoutStatistics(trained[0][1])
    for _, state_dict in trained:
        statistics.update(state_dict)
    layout = statistics.layout(4, Normalisation.residual)
    values = torch.stack([flatten(layout, state_dict) for _, state_dict in trained])
    originals = [Network(f"o{i}", UNSEEN, TaskSplit.unseen, network(UNSEEN, 0.05, 100 + i)) for i in range(3)]
    originals += [Network("seen", *trained[0][:1], TaskSplit.seen, trained[0][1])]
    generated = [Network(f"g{i}", UNSEEN, TaskSplit.unseen, network(UNSEEN, 0.1, 200 + i)) for i in range(4)]
    copied = Network("copy", seen[0], TaskSplit.seen, trained[0][1])
    result = measure(
        layout, TrainingSet(values, [c for c, _ in trained]), originals, [*generated, copied],
        answers, right_answers, str, noise_levels=(0.02,), ridge_penalty=1e-3, seed=0,
    )  # fmt: skip
    return layout, trained, values, originals, generated, result


def accuracy(state_dict, condition):
    return (answers([state_dict]) == right_answers([condition])).float().mean().item()


def test_flatten_and_unflatten_are_inverse(measured):
    layout, trained, *_ = measured
    back = unflatten(layout, flatten(layout, trained[4][1]))
    torch.testing.assert_close(back["weight"], trained[4][1]["weight"])
    assert back["steps"].equal(trained[4][1]["steps"])


def test_accuracies_and_wrong_answers(measured):
    *_, originals, generated, result = measured
    for networks, found in ((originals, result.originals), (generated, result.generated)):
        for one, evaluated in zip(networks, found, strict=False):
            assert evaluated.accuracy == pytest.approx(accuracy(one.state_dict, one.condition), abs=1e-6)
            assert evaluated.wrong.sum() == round((1 - evaluated.accuracy) * len(IMAGES))
            assert evaluated.task == str(one.condition)


def test_ridge_baselines_equal_scikit_learn(measured):
    layout, trained, values, *_, result = measured
    conditions = np.array([c for c, _ in trained])
    predicted = Ridge(alpha=1e-3).fit(conditions, values.numpy()).predict(np.array([UNSEEN]))
    state_dict = unflatten(layout, torch.tensor(predicted[0], dtype=torch.float32))
    assert result.baselines["ridge_1"][str(UNSEEN)] == pytest.approx(accuracy(state_dict, UNSEEN), abs=1e-6)


def test_centre_nearest_task_and_majority(measured):
    _, trained, *_, result = measured
    mean = {"weight": torch.stack([state_dict["weight"] for _, state_dict in trained]).mean(0)}
    assert result.baselines["centre"][str(UNSEEN)] == pytest.approx(accuracy(mean, UNSEEN), abs=1e-6)
    # The task's neighbours at Hamming distance one: the first checkpoint of each, averaged.
    nearest = [
        state_dict
        for i, (c, state_dict) in enumerate(trained)
        if sum(a != b for a, b in zip(c, UNSEEN, strict=True)) == 1 and i % 3 == 0
    ]
    expected = sum(accuracy(state_dict, UNSEEN) for state_dict in nearest) / len(nearest)
    assert result.baselines["nearest_task"][str(UNSEEN)] == pytest.approx(expected, abs=1e-6)
    share = right_answers([UNSEEN]).float().mean().item()
    assert result.baselines["majority"][str(UNSEEN)] == pytest.approx(max(share, 1 - share), abs=1e-6)


def test_a_copy_of_a_training_checkpoint_has_distance_zero(measured):
    *_, result = measured
    distances = {evaluated.name: evaluated.distance for evaluated in result.generated}
    assert distances["copy"] == pytest.approx(0, abs=1e-6)
    assert min(distance for name, distance in distances.items() if name != "copy") > 0.05
    assert len(result.sibling_distances) == 15


def test_noised_originals_are_evaluated(measured):
    *_, originals, _, result = measured
    assert len(result.noised[0.02]) == len(originals)
    assert all(evaluated.split in (TaskSplit.seen, TaskSplit.unseen) for evaluated in result.noised[0.02])
