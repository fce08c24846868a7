"""The networks for CIFAR-10's ten classes: sizes, answers against a loop over images, loss."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rpg.config import CollectConfig
from rpg.errors import RPGError
from rpg.tasks.cifar10_classifiers import (
    Cifar10Classifier,
    ConvNextAtto,
    ConvNextLarge,
    MobileNetV3,
    ResNet18,
    ResNet50,
    ViTBase,
    ViTSmall,
    ViTTiny,
)
from rpg.tasks.cifar10_images import cifar10_images
from rpg.tasks.families import ENTRY_POINTS
from rpg.tasks.named_networks import named_network
from tests.cifar10_files import write_cifar10

CPU = torch.device("cpu")
MEAN = torch.tensor([0.4914, 0.4822, 0.4465])
DEVIATION = torch.tensor([0.2470, 0.2435, 0.2616])


class Small(Cifar10Classifier):
    """A network that a test trains in seconds."""

    network = "timm:test_vit"
    arguments: ClassVar[dict[str, Any]] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1}
    recipe = replace(ViTTiny.recipe, last_learning_rate=1e-3)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("images")
    write_cifar10(directory, train=60, test=20)
    return str(directory)


def test_the_resnet_is_resnet18_with_a_stem_for_small_images() -> None:
    network = ResNet18("", CPU).build_network()
    assert sum(parameter.numel() for parameter in network.parameters()) == 11_173_962
    places: list[torch.Size] = []
    layer: Any = network.layer4
    hook = layer.register_forward_hook(lambda module, inputs, output: places.append(output.shape))
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    hook.remove()
    assert places == [(2, 512, 4, 4)]


@pytest.mark.parametrize(
    ("family", "millions"),
    [(ResNet50, 23.5), (MobileNetV3, 4.2), (ViTTiny, 5.4), (ViTSmall, 21.3), (ViTBase, 85.2),
     (ConvNextAtto, 3.4), (ConvNextLarge, 196.2)],
)  # fmt: skip
def test_the_networks_have_the_sizes_that_their_names_say(
    family: type[Cifar10Classifier], millions: float
) -> None:
    with torch.device("meta"):
        network = family("", CPU).build_network()
        assert network.eval()(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) / 1e6 == pytest.approx(
        millions, rel=0.01
    )


def test_every_network_is_a_family_that_configs_can_name() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = set(project["entry-points"][ENTRY_POINTS].values())
    ours = [ResNet18, ResNet50, MobileNetV3, ViTTiny, ViTSmall, ViTBase, ConvNextAtto, ConvNextLarge]
    assert {f"{each.__module__}:{each.__name__}" for each in ours} <= names


def test_checkpoints_come_in_order_and_answer_as_in_a_plain_loop(images: str, tmp_path: Path) -> None:
    family = Small(images, CPU)
    config = CollectConfig(backbone_epochs=1, batch_size=9, learning_rate=2e-3, checkpoints_per_task=3)
    got = list(family.checkpoints(config, 0, tmp_path / "state.pt"))
    assert [line.split(",")[0] for line in got if isinstance(line, str)] == ["epoch 1/2", "epoch 2/2"]
    found = [{n: v.clone() for n, v in each.items()} for each in got if isinstance(each, dict)]
    assert len(found) == 3
    test, network = cifar10_images(images, "test"), family.build_network().eval()
    answers = family.predict_many(found, "test")
    for row, checkpoint in zip(answers, found, strict=True):
        network.load_state_dict(checkpoint, strict=True)
        with torch.no_grad():
            alone = [
                int(network(((image / 255.0 - MEAN) / DEVIATION).movedim(2, 0)[None])[0].argmax())
                for image in test.pixels
            ]
        assert row.tolist() == alone
    assert family.labels(None, "test").equal(test.classes)


def test_the_loss_is_the_cross_entropy_of_augmented_training_images(images: str) -> None:
    family = Small(images, CPU)
    inputs, classes = family.batch(7, torch.Generator().manual_seed(3))
    again, _ = family.batch(7, torch.Generator().manual_seed(3))
    assert inputs.equal(again)
    assert inputs.shape == (7, 3, 32, 32)
    logits = family.build_network()(inputs)
    plain = torch.stack([-row.log_softmax(0)[label] for row, label in zip(logits, classes, strict=True)])
    torch.testing.assert_close(family.loss(logits, (inputs, classes), None), plain.mean())
    assert F.one_hot(classes, 10).sum() == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [("resnet18", "expected torchvision:NAME or timm:NAME, got 'resnet18'"),
     ("timm:no_such_network", "'timm:no_such_network': .*no_such_network"),
     ("torchvision:no_such_network", "'torchvision:no_such_network': .*no_such_network")],
)  # fmt: skip
def test_a_network_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(RPGError, match=message):
        named_network(name, {})


def test_arguments_that_do_not_fit_are_told_in_one_line() -> None:
    with pytest.raises(RPGError, match=r"network: 'torchvision:resnet18': .*colour"):
        named_network("torchvision:resnet18", {"colour": "red"})
    assert isinstance(named_network("torchvision:resnet18", {"num_classes": 2}), nn.Module)
