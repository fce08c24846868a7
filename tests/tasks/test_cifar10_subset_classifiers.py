"""Networks for class subsets, fine-tuned side by side: against networks that are trained alone."""

import math
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rpg.config import CollectConfig
from rpg.errors import RPGError
from rpg.seeds import derived_seed
from rpg.tasks.cifar10_images import cifar10_images
from rpg.tasks.cifar10_net import Cifar10Net
from rpg.tasks.cifar10_subset_classifiers import Cifar10SubsetClassifier, SubsetViTTiny, stacked_from
from rpg.tasks.class_subsets import class_bits
from rpg.tasks.families import Task
from rpg.tasks.image_networks import ADAMW
from rpg.tasks.shared_batches import batches
from tests.cifar10_files import write_cifar10

CPU = torch.device("cpu")
CONFIG = CollectConfig(backbone_epochs=1, epochs=2, batch_size=9, learning_rate=1e-3)
TASKS = [Task("341", class_bits(341)), Task("7", class_bits(7)), Task("682", class_bits(682))]


class Small(Cifar10SubsetClassifier):
    """A network that a test trains in seconds."""

    network = "timm:test_vit"
    arguments: ClassVar[dict[str, Any]] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}
    recipe = replace(ADAMW, last_learning_rate=1e-3)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Small:
    directory = tmp_path_factory.mktemp("images")
    write_cifar10(directory, train=600, test=20)
    return Small(str(directory), CPU)


@pytest.fixture(scope="module")
def backbone(family: Small) -> dict[str, Tensor]:
    return family.backbone(CONFIG, 0)


def trained_alone(family: Small, backbone: dict[str, Tensor], task: Task, copy: int) -> dict[str, Tensor]:
    """One network after a plain loop with PyTorch's Adam, which sees the family's images."""
    network = family.build_network().eval()
    network.load_state_dict(
        {
            name: torch.zeros_like(value) if name.startswith("head.") else backbone[name]
            for name, value in network.state_dict().items()
        }
    )
    images = cifar10_images(family.directory, "train")
    steps = 2 * (len(images.classes) // 9)
    adam = torch.optim.Adam(network.parameters(), 1e-3, betas=(0.9, 0.99))
    order = derived_seed(5, "fine-tuning order", copy)
    for step, (pixels, classes) in enumerate(batches(images, order, 2, 9), 1):
        rate = 1e-3 * min(1.0, step / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        right = torch.tensor([task.condition[label] for label in classes.tolist()])
        loss = F.binary_cross_entropy_with_logits(network(family.inputs(pixels))[:, 0], right)
        loss.backward()
        adam.step()
    return network.state_dict()


def test_networks_trained_side_by_side_are_those_trained_alone(
    family: Small, backbone: dict[str, Tensor]
) -> None:
    models = [(TASKS[0], 0), (TASKS[1], 0), (TASKS[0], 1)]
    found = family.fine_tune(backbone, models, CONFIG, 5)
    for network, (task, copy) in zip(found, models, strict=True):
        alone = trained_alone(family, backbone, task, copy)
        assert list(network) == list(alone)
        for name, value in alone.items():
            # Adam makes steps of rounding errors where the gradient is zero, as it is for biases of keys.
            torch.testing.assert_close(network[name], value, rtol=1e-2, atol=2e-3, msg=name)
    # Copies of a task differ in the order of the images.
    assert not found[0]["head.weight"].equal(found[2]["head.weight"])


def test_answers_are_those_of_the_networks_alone(family: Small, backbone: dict[str, Tensor]) -> None:
    found = family.fine_tune(backbone, [(task, 0) for task in TASKS], CONFIG, 5)
    test = cifar10_images(family.directory, "test")
    inputs = family.inputs(test.pixels)
    answers = family.predict_many(found, "test")
    logits = family.outputs_many(
        {name: torch.stack([each[name] for each in found]) for name in found[0]}, (inputs, test.classes)
    )
    assert logits.shape == (3, 20, 1)
    for i, state_dict in enumerate(found):
        network = family.build_network().eval()
        network.load_state_dict(state_dict, strict=True)
        with torch.no_grad():
            alone = network(inputs)
        assert answers[i].equal(alone[:, 0] > 0)
        torch.testing.assert_close(logits[i], alone, rtol=1e-4, atol=1e-5)
        right = torch.tensor([TASKS[i].condition[label] for label in test.classes.tolist()])
        loss = family.loss(logits[i], (inputs, test.classes), TASKS[i].condition)
        torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(alone[:, 0], right))
        assert family.labels(TASKS[i].condition, "test").equal(right.bool())


def test_the_backbone_answers_by_its_classes(family: Small, backbone: dict[str, Tensor]) -> None:
    network = family.with_outputs(10).eval()
    network.load_state_dict(backbone, strict=True)
    test = cifar10_images(family.directory, "test")
    with torch.no_grad():
        classes = network(family.inputs(test.pixels)).argmax(1).tolist()
    for task in TASKS:
        [answers] = family.references(backbone, task.condition, "test").values()
        assert answers.tolist() == [bool(task.condition[label]) for label in classes]


def test_a_network_with_batchnorm_is_refused() -> None:
    network = Cifar10Net()
    with pytest.raises(RPGError, match="networks with BatchNorm or other buffers cannot be fine-tuned"):
        stacked_from(network, network.state_dict(), 2)


def test_batches_larger_than_the_images_are_refused(family: Small, backbone: dict[str, Tensor]) -> None:
    with pytest.raises(RPGError, match=r"collect\.batch_size: expected at most the 540 training images"):
        family.fine_tune(backbone, [(TASKS[0], 0)], replace(CONFIG, batch_size=1000), 0)


def test_the_transformer_has_a_place_for_every_patch(family: Small) -> None:
    with torch.device("meta"):
        network = SubsetViTTiny(family.directory, CPU).build_network()
        assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 1)
    names = dict(network.named_parameters())
    assert names["pos_embed"].shape == (1, 65, 192)
    assert sum(value.numel() for value in names.values()) == pytest.approx(5.36e6, rel=0.01)
