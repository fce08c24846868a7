"""The task family `cifar10`: its networks learn, and only from training images."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rpg.config import CollectConfig
from rpg.errors import RPGError
from rpg.tasks.binary_cifar10 import TEACHERS, BinaryCifar10
from rpg.tasks.cifar10_images import cifar10_images
from rpg.tasks.cifar10_net import Cifar10Net, is_first_layer, normalised, stacked
from rpg.tasks.class_subsets import class_bits
from rpg.tasks.families import Asked, Task
from rpg.tasks.fine_tuning import with_set_heads
from tests.cifar10_files import write_cifar10

TASKS = [314, 1, 589]
CONFIG = CollectConfig(backbone_epochs=25, epochs=8, batch_size=32, learning_rate=5e-3)


def task_of(task: int) -> Task:
    return Task(str(task), class_bits(task))


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
    return family.backbone(CONFIG, seed=0)


def test_labels_ask_whether_the_class_is_in_the_set(family: BinaryCifar10, directory: str) -> None:
    found = [family.labels(class_bits(task), "test") for task in (314, 1)]
    classes = cifar10_images(directory, "test").classes.tolist()
    for row, members in zip(found, ({1, 4, 5, 6, 8}, {9}), strict=True):
        assert row.tolist() == [c in members for c in classes]


def test_fine_tuned_networks_learn_their_tasks(
    family: BinaryCifar10, backbone: dict[str, Tensor], directory: str
) -> None:
    models = [(task_of(task), copy) for task in TASKS for copy in range(2)]
    trained = family.fine_tune(backbone, models, CONFIG, seed=0)
    answers = family.predict_many(trained, "test", group=4)
    right = torch.stack([family.labels(task.condition, "test") for task, _ in models])
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
    quick = CollectConfig(epochs=1, batch_size=32, learning_rate=5e-3)
    (alone,) = family.fine_tune(backbone, [(task_of(314), 1)], quick, seed=0)
    among = family.fine_tune(
        backbone, [(task_of(589), 1), (task_of(314), 1), (task_of(314), 0)], quick, seed=0
    )
    (other,) = family.fine_tune(backbone, [(task_of(314), 1)], quick, seed=1)
    for name, value in alone.items():
        torch.testing.assert_close(among[1][name], value, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(other["head.weight"], alone["head.weight"], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(among[2]["head.weight"], alone["head.weight"], rtol=1e-3, atol=1e-4)
    # All but the first layer is trained, BatchNorm's statistics as well.
    start = with_set_heads(
        {name: value[0] for name, value in backbone.items()}, torch.tensor([class_bits(314)])
    )
    for name, value in alone.items():
        assert torch.equal(value, start[name][0]) == name.startswith(("conv1.", "norm1.")), name


def test_the_backbone_knows_ten_classes_and_other_randomness_is_left_alone(family: BinaryCifar10) -> None:
    quick = CollectConfig(backbone_epochs=1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = family.backbone(quick, seed=0)
    assert torch.equal(torch.rand(2), expected)
    assert first.keys() == Cifar10Net(outputs=10).state_dict().keys()
    assert first["head.weight"].shape == (TEACHERS, 21, 64)
    assert not torch.equal(family.backbone(quick, seed=1)["conv1.weight"], first["conv1.weight"])


def test_references_are_what_the_ten_class_networks_answer(
    family: BinaryCifar10, backbone: dict[str, Tensor], directory: str
) -> None:
    found = family.references(backbone, class_bits(314), "test")
    images = normalised(cifar10_images(directory, "test").pixels)
    network, likely = Cifar10Net(outputs=21).eval(), []
    for number in range(TEACHERS):
        network.load_state_dict({name: value[number] for name, value in backbone.items()})
        with torch.no_grad():
            likely.append(network(images)[:, :10].softmax(1)[:, [1, 4, 5, 6, 8]].sum(1))
    alone, together = found.values()
    assert torch.equal(alone, likely[0] > 0.5)
    mean = torch.stack(likely).mean(0)
    sure = (mean - 0.5).abs() > 1e-4
    assert torch.equal(together[sure], (mean > 0.5)[sure])


def test_the_loss_is_that_of_the_plain_networks(family: BinaryCifar10) -> None:
    """With a first layer of their own, and with one that they share."""
    networks = [Cifar10Net().eval() for _ in range(3)]
    stacks = stacked([network.state_dict() for network in networks], torch.device("cpu"))
    batch = family.batch(20, torch.Generator().manual_seed(1))
    conditions: list[Asked] = [class_bits(task) for task in TASKS]
    shared = {
        name: value[:1].expand(3, *value.shape[1:]) if is_first_layer(name) else value
        for name, value in stacks.items()
    }
    for state in (stacks, shared):
        losses = family.loss_many(family.outputs_many(state, batch), batch, conditions)
        for i, condition in enumerate(conditions):
            networks[i].load_state_dict({name: value[i] for name, value in state.items()})
            logits = networks[i](batch[0])[:, 0]
            right = torch.tensor(condition)[batch[1]]
            torch.testing.assert_close(losses[i], F.binary_cross_entropy_with_logits(logits, right))


def test_predictions_of_no_models_are_empty(family: BinaryCifar10) -> None:
    assert family.predict_many([], "test").shape == (0, 60)


def test_networks_have_tens_of_thousands_of_parameters() -> None:
    for outputs in (1, 10):
        assert sum(p.numel() for p in Cifar10Net(outputs).parameters()) == 64128 + 65 * outputs


def test_missing_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(RPGError, match=r"no images found \(collect\.images\); expected .*train\.parquet"):
        BinaryCifar10(str(tmp_path), torch.device("cpu")).check()
