"""The task family `digits`: labels, predictions, and networks that work."""

import pytest
import torch
from torch import Tensor

from rpg.config import CollectConfig
from rpg.tasks.binary_digits import BinaryDigits
from rpg.tasks.class_subsets import class_bits
from rpg.tasks.digits import digits_images
from rpg.tasks.families import Task

TASKS = [314, 1, 589, 1022]
FAMILY = BinaryDigits()
CONFIG = CollectConfig(backbone_epochs=15, epochs=6)


@pytest.fixture(scope="module")
def backbone() -> dict[str, Tensor]:
    return FAMILY.backbone(CONFIG, seed=0)


def task_of(task: int) -> Task:
    return Task(str(task), class_bits(task))


def accuracy(models: list[dict[str, Tensor]], tasks: list[int], split: str) -> Tensor:
    labels = torch.stack([FAMILY.labels(class_bits(task), split) for task in tasks])
    right = FAMILY.predict_many(models, split) == labels
    return right.double().mean(1)


def test_labels_ask_whether_the_class_is_in_the_set() -> None:
    found = [FAMILY.labels(class_bits(task), "validation") for task in (314, 1)]
    for row, members in zip(found, ({1, 4, 5, 6, 8}, {9}), strict=True):
        assert row.tolist() == [c in members for c in digits_images()["validation"].classes.tolist()]


def test_fine_tuned_networks_are_accurate(backbone: dict[str, Tensor]) -> None:
    models = FAMILY.fine_tune(
        backbone, [(task_of(task), copy) for task in TASKS for copy in range(2)], CONFIG, seed=0
    )
    tasks = [task for task in TASKS for _ in range(2)]
    assert accuracy(models, tasks, "validation").min() > 0.9
    # Copies of a task have the same start and differ in their data order.
    assert not torch.equal(models[0]["head.weight"], models[1]["head.weight"])
    network = FAMILY.build_network()
    images = digits_images()["test"].images
    answers = FAMILY.predict_many(models, "test", group=3)
    for model, answer in zip(models, answers, strict=True):
        network.load_state_dict(model, strict=True)
        with torch.no_grad():
            logits = network(images)[:, 0]
        sure = logits.abs() > 1e-4
        assert torch.equal((logits > 0)[sure], answer[sure])


def test_a_model_is_determined_by_seed_task_and_copy(backbone: dict[str, Tensor]) -> None:
    quick = CollectConfig(epochs=1)
    (alone,) = FAMILY.fine_tune(backbone, [(task_of(314), 1)], quick, seed=0)
    among = FAMILY.fine_tune(
        backbone, [(task_of(589), 0), (task_of(314), 1), (task_of(314), 0)], quick, seed=0
    )
    other = FAMILY.fine_tune(backbone, [(task_of(314), 1)], quick, seed=1)[0]
    for name, value in alone.items():
        torch.testing.assert_close(among[1][name], value, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(other["head.weight"], alone["head.weight"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(among[2]["head.weight"], alone["head.weight"], rtol=1e-3, atol=1e-4)


def test_the_backbone_knows_ten_classes_and_other_randomness_is_left_alone() -> None:
    quick = CollectConfig(backbone_epochs=1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = FAMILY.backbone(quick, seed=0)
    assert torch.equal(torch.rand(2), expected)
    assert first["head.weight"].shape == (10, 96)
    assert all(torch.equal(value, first[name]) for name, value in FAMILY.backbone(quick, seed=0).items())
    assert not torch.equal(FAMILY.backbone(quick, seed=1)["conv1.weight"], first["conv1.weight"])


def test_predictions_of_no_models_are_empty() -> None:
    assert FAMILY.predict_many([], "test").shape[0] == 0
