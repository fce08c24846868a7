"""Measuring networks whose answers are known: linear classifiers, evaluated by hand beside it."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from rpg.collection.statistics import LayoutStatistics
from rpg.config import Normalisation
from rpg.evaluation import baselines
from rpg.evaluation.baselines import majority_accuracy
from rpg.evaluation.judge import ACCURACY, Candidate, FamilyJudge, Measurement
from rpg.evaluation.measure import measure
from rpg.evaluation.networks import Network, TrainingSet, condition_name, flatten, unflatten
from rpg.evaluation.results import TaskSplit
from rpg.seeds import derived_seed
from rpg.tasks.families import Metric

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


class ByHand:
    """A judge that runs the classifiers on the images."""

    name = "by hand"
    metrics = (ACCURACY,)

    def check(self):
        pass

    def measure(self, networks, split):
        assert split == "test"
        rows = []
        for network in networks:
            if network.state_dict["weight"].abs().max() > 1000:
                rows.append(Measurement({}, None, f"{network.name}: diverged"))
                continue
            wrong = answers([network.state_dict])[0] != right_answers([network.asked])[0]
            rows.append(Measurement({"accuracy": 1 - wrong.float().mean().item()}, wrong.numpy()))
        return rows

    def majority(self, asked, split):
        return majority_accuracy(right_answers([asked])[0])


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
        ByHand(), "test", str, noise_levels=(0.02,), ridge_penalty=1e-3, seed=0,
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
            assert evaluated.score == pytest.approx(accuracy(one.state_dict, one.condition), abs=1e-6)
            assert evaluated.wrong.sum() == round((1 - evaluated.score) * len(IMAGES))
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


def test_a_noised_training_checkpoint_is_near_and_the_nearer_the_less_noise_it_has(measured):
    layout, trained, values, originals, generated, _ = measured
    seen = [n for n in originals if n.split == TaskSplit.seen]
    conditions = [condition for condition, _ in trained]
    found = measure(
        layout, TrainingSet(values, conditions), seen, generated, None, "test", str, (0.01, 0.04), 1e-3, 0
    ).noised_distances
    assert [len(found[level]) for level in (0.01, 0.04)] == [1, 1]
    assert 0 < found[0.01][0] < found[0.04][0] < 0.5


def test_without_a_judge_distances_are_measured_all_the_same(measured):
    layout, trained, values, originals, generated, with_judge = measured
    conditions = [condition for condition, _ in trained]
    found = measure(
        layout, TrainingSet(values, conditions), originals, generated, None, "test", str, (0.02,), 1e-3, 0
    )
    assert found.metric is None
    assert found.baselines == {}
    assert [each.score for each in (*found.originals, *found.generated)] == [None] * 8
    expected = [each.distance for each in with_judge.generated if each.name != "copy"]
    assert [each.distance for each in found.generated] == pytest.approx(expected)
    assert min(found.generated_distances) > 0


def test_a_network_that_cannot_be_measured_is_left_out_with_its_reason(measured):
    layout, trained, values, originals, generated, _ = measured
    diverged = Network(
        "g9", UNSEEN, TaskSplit.unseen, {**generated[0].state_dict, "weight": torch.full((6,), 1e6)}
    )
    conditions = [condition for condition, _ in trained]
    found = measure(
        layout,
        TrainingSet(values, conditions),
        originals,
        [*generated, diverged],
        ByHand(),
        "test",
        str,
        (),
        1e-3,
        0,
    )
    assert [each.score is None for each in found.generated] == [False] * 4 + [True]
    assert found.left_out == ["g9: diverged"]


def test_a_collection_without_conditions_has_one_task(measured):
    layout, _, values, *_ = measured

    class Norm(ByHand):
        metrics = (Metric("norm", higher_is_better=False, unit="m"),)

        def measure(self, networks, split):
            return [Measurement({"norm": n.state_dict["weight"].norm().item()}) for n in networks]

        def majority(self, asked, split):
            return None

    originals = [Network("o", None, TaskSplit.seen, unflatten(layout, values[0]))]
    generated = [Network(f"g{i}", None, TaskSplit.seen, unflatten(layout, values[i])) for i in range(3)]
    found = measure(
        layout,
        TrainingSet(values, None),
        originals,
        generated,
        Norm(),
        "test",
        condition_name,
        (0.1,),
        1e-3,
        0,
    )
    assert found.metric == Norm.metrics[0]
    mean = unflatten(layout, values.double().mean(0).float())["weight"].norm().item()
    assert found.baselines == {"centre": {"all": pytest.approx(mean)}}
    assert [each.score for each in found.generated] == [
        pytest.approx(unflatten(layout, values[i])["weight"].norm().item()) for i in range(3)
    ]
    assert len(found.sibling_distances) == len(values)


def test_names_of_different_conditions_differ():
    conditions = [(0.0, 1.0, 1.0), (0.1, 0.2, 0.3, 0.4), (0.1, 0.2, 0.3, 0.5), (0.5,), None]
    assert len({condition_name(condition) for condition in conditions}) == 5
    assert condition_name((0.0, 1.0, 1.0)) == "011"


def test_a_family_gives_its_references_its_answers_and_its_training_data():
    family = FamilyJudge(f"{Path(__file__).parents[1] / 'tasks' / 'my_tasks.py'}:Referenced")
    torch.manual_seed(2)
    conditions = [(1.0,), (1.5,), (2.0,)]
    trained = [family.family.build_network().state_dict() for _ in conditions]
    unseen = (1.25,)
    originals = [
        Network(f"o{i}", unseen, TaskSplit.unseen, family.family.build_network().state_dict())
        for i in range(3)
    ]
    generated = [
        Network(f"g{i}", unseen, TaskSplit.unseen, family.family.build_network().state_dict())
        for i in range(3)
    ]
    statistics = LayoutStatistics(trained[0])
    for state_dict in trained:
        statistics.update(state_dict)
    layout = statistics.layout(4, Normalisation.residual)
    values = torch.stack([flatten(layout, state_dict) for state_dict in trained])
    found = measure(
        layout, TrainingSet(values, conditions), originals, generated, family, "test", str, (0.02,), 1e-3, 5,
        best_originals=lambda metric: originals[1:2], read_backbone=lambda: trained[0],
    )  # fmt: skip
    assert found.left_out == []
    assert found.baselines["best_original"] == {str(unseen): found.originals[1].score}
    [alone] = family.measure([Candidate("b", trained[0], [1.25])], "test")
    assert found.baselines["the backbone"] == {str(unseen): pytest.approx(alone.metrics["accuracy"])}
    assert found.baselines["all wrong"] == {str(unseen): 0.0}
    assert all(each.answers is not None for each in (*found.originals, *found.generated))
    assert all(each.answers is None for each in found.noised[0.02])
    networks = [Candidate(n.name, n.state_dict, n.asked) for n in generated]
    recomputed, _ = family.with_batchnorm_recomputed(networks, derived_seed(5, "BatchNorm", 0))
    scores = [each.metrics["accuracy"] for each in family.measure(recomputed, "test")]
    assert [each.score for each in found.recomputed] == scores
    assert [each.name for each in found.recomputed] == [f"g{i} with BatchNorm recomputed" for i in range(3)]
    assert scores != [each.score for each in found.generated]


def test_baselines_are_measured_a_few_networks_at_a_time(measured, monkeypatch):
    layout, trained, values, originals, *_ = measured
    sizes = []

    class Counts(ByHand):
        def measure(self, networks, split):
            sizes.append(len(networks))
            return super().measure(networks, split)

    predicted = []

    def ridge(*arguments):
        predicted.append(len(arguments[2]))
        return baselines.ridge(*arguments)

    def all_baselines():
        sizes.clear()
        predicted.clear()
        everywhere = [
            Network(f"g{c}", c, TaskSplit.unseen, network(c, 0.1, 300 + i)) for i, c in enumerate(CONDITIONS)
        ]
        return measure(
            layout, TrainingSet(values, [c for c, _ in trained]), originals, everywhere,
            Counts(), "test", str, noise_levels=(), ridge_penalty=1e-3, seed=0,
        ).baselines  # fmt: skip

    monkeypatch.setattr("rpg.evaluation.baseline_scores.ridge", ridge)
    whole = all_baselines()
    assert max(sizes) >= len(CONDITIONS)
    assert predicted == [len(CONDITIONS)] * 3
    # Two networks of six float32 weights and an int64.
    for module in ("networks", "baseline_scores"):
        monkeypatch.setattr(f"rpg.evaluation.{module}.BYTES_AT_ONCE", 2 * (6 * 4 + 8))
    found = all_baselines()
    assert max(sizes) == 3
    assert max(predicted) == 2
    assert found == whole
