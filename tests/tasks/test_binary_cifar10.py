"""The task family `cifar10`: its networks learn, and only from training images."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from rpg.config import CollectConfig
from rpg.errors import RPGError
from rpg.tasks.binary_cifar10 import BinaryCifar10
from rpg.tasks.cifar10_images import cifar10_images
from rpg.tasks.cifar10_net import Cifar10Net, normalised
from rpg.tasks.class_subsets import class_bits
from tests.cifar10_files import write_cifar10

TASKS = [314, 1, 589]
CONFIG = CollectConfig(family="cifar10", backbone_epochs=5, epochs=8, batch_size=32, learning_rate=5e-3)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("cifar10")
    write_cifar10(path, train=180, test=60)
    return str(path)


@pytest.fixture(scope="module")
def family(directory: str) -> BinaryCifar10:
    return BinaryCifar10(directory, torch.device("cpu"))


@pytest.fixture(scope="module")
def backbone(family: BinaryCifar10) -> dict[str, Tensor]:
    return family.train_backbone(CONFIG, seed=0)


def test_labels_ask_whether_the_class_is_in_the_set(family: BinaryCifar10, directory: str) -> None:
    found = family.labels([class_bits(314), class_bits(1)], "test")
    classes = cifar10_images(directory, "test").classes.tolist()
    for row, members in zip(found, ({1, 4, 5, 6, 8}, {9}), strict=True):
        assert row.tolist() == [c in members for c in classes]


def test_fine_tuned_networks_learn_their_tasks(
    family: BinaryCifar10, backbone: dict[str, Tensor], directory: str
) -> None:
    models = [(task, copy) for task in TASKS for copy in range(2)]
    trained = family.fine_tune(backbone, models, CONFIG, seed=0)
    answers = family.predict(trained, "test", group=4)
    right = family.labels([class_bits(task) for task, _ in models], "test")
    majority = torch.maximum(right.double().mean(1), 1 - right.double().mean(1))
    assert ((answers == right).double().mean(1) - majority).mean() > 0.1
    # Copies of a task have the same start and differ in their data order.
    assert not torch.equal(trained[0]["head.weight"], trained[1]["head.weight"])
    network = family.build_network().eval()
    assert list(network.state_dict()) == list(trained[0])
    images = normalised(cifar10_images(directory, "test").pixels)
    for model, answer in zip(trained, answers, strict=True):
        network.load_state_dict(model, strict=True)
        with torch.no_grad():
            logits = network(images)[:, 0]
        sure = logits.abs() > 1e-4
        assert torch.equal((logits > 0)[sure], answer[sure])


def test_a_model_is_determined_by_seed_task_and_copy(
    family: BinaryCifar10, backbone: dict[str, Tensor]
) -> None:
    quick = CollectConfig(family="cifar10", epochs=1, batch_size=32, learning_rate=5e-3)
    (alone,) = family.fine_tune(backbone, [(314, 1)], quick, seed=0)
    among = family.fine_tune(backbone, [(589, 1), (314, 1), (314, 0)], quick, seed=0)
    (other,) = family.fine_tune(backbone, [(314, 1)], quick, seed=1)
    for name, value in alone.items():
        torch.testing.assert_close(among[1][name], value, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(other["head.weight"], alone["head.weight"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(among[2]["head.weight"], alone["head.weight"], rtol=1e-3, atol=1e-4)
    # The head starts at zero and everything is trained, BatchNorm's statistics as well.
    for name, value in alone.items():
        before = torch.zeros_like(value) if name.startswith("head.") else backbone[name]
        assert not torch.equal(value, before), name


def test_the_backbone_knows_ten_classes_and_other_randomness_is_left_alone(family: BinaryCifar10) -> None:
    quick = CollectConfig(family="cifar10", backbone_epochs=1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = family.train_backbone(quick, seed=0)
    assert torch.equal(torch.rand(2), expected)
    assert first.keys() == Cifar10Net(outputs=10).state_dict().keys()
    assert first["head.weight"].shape == (10, 64)
    assert not torch.equal(family.train_backbone(quick, seed=1)["conv1.weight"], first["conv1.weight"])


def test_predictions_of_no_models_are_empty(family: BinaryCifar10) -> None:
    assert family.predict([], "test").shape == (0, 60)


def test_networks_have_tens_of_thousands_of_parameters() -> None:
    for outputs in (1, 10):
        assert sum(p.numel() for p in Cifar10Net(outputs).parameters()) == 64128 + 65 * outputs


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(RPGError, match=r"train\.parquet: not found"):
        BinaryCifar10(str(tmp_path), torch.device("cpu")).check_images()
