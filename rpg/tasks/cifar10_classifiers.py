"""Task families of CIFAR-10's ten classes: networks of torchvision and timm, and checkpoints along training.

Each family is one network, whose collection has no conditions: its checkpoints are those of the last epoch of
one training run (`rpg.tasks.along_training`). Another network is a class of a few lines:

    class MyConvNext(Cifar10Classifier):
        network = "timm:convnext_pico"
        arguments = {"patch_size": 2}
        recipe = ADAMW
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.config import CollectConfig
from rpg.tasks.cifar10_images import SIZE, cifar10_images
from rpg.tasks.cifar10_networks import ADAMW, Cifar10Networks
from rpg.tasks.families import Asked


class Cifar10Classifier(Cifar10Networks):
    """A family of one network; its collection is checkpoints along the last epoch of one training run."""

    def checkpoints(self, config: CollectConfig, seed: int, state: Path) -> Iterator[str | dict[str, Tensor]]:
        """Train the network; checkpoints of the last epoch, and after each epoch how far it is.

        Args:
            config: `backbone_epochs` with a changing learning rate, and one more; `batch_size`; the largest
                `learning_rate`; and `checkpoints_per_task`, which are all.
            seed: of the weights that training starts from and of the images' order.
            state: a file from which a training that was killed goes on.
        """
        recipe = replace(
            self.recipe,
            epochs=config.backbone_epochs + 1,
            batch_size=config.batch_size,
            peak_learning_rate=config.learning_rate,
            checkpoints=config.checkpoints_per_task,
        )
        yield from self.trained(recipe, seed, state)

    def labels(self, condition: Asked, split: str) -> Tensor:
        """Each image's class, int64 [images]."""
        return cifar10_images(self.directory, split).classes

    def predict_many(self, models: list[dict[str, Tensor]], split: str) -> Tensor:
        """The classes that models predict for a split's images, int64 [models, images]."""
        return torch.stack([logits.argmax(1) for logits in self.logits(models, split)])

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor], condition: Asked) -> Tensor:
        """Mean cross-entropy of logits [images, 10]."""
        return F.cross_entropy(outputs, batch[1])


def _with_small_stem(network: nn.Module) -> nn.Module:
    """A ResNet with the usual stem for small images.

    Its first convolution is 3 × 3 with stride 1 instead of 7 × 7 with stride 2, and no pooling follows it.
    """
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


class ResNet18(Cifar10Classifier):
    """torchvision's ResNet-18, 11,173,962 parameters, with the stem for small images."""

    network = "torchvision:resnet18"

    def with_outputs(self, outputs: int) -> nn.Module:
        """The network with so many outputs, with new weights."""
        return _with_small_stem(super().with_outputs(outputs))


class ResNet50(Cifar10Classifier):
    """timm's ResNet-50 with GroupNorm, with the stem for small images."""

    network = "timm:resnet50_gn"

    def with_outputs(self, outputs: int) -> nn.Module:
        """The network with so many outputs, with new weights."""
        return _with_small_stem(super().with_outputs(outputs))


class MobileNetV3(Cifar10Classifier):
    """timm's MobileNetV3-Large, whose first convolution has stride 1."""

    network = "timm:mobilenetv3_large_100"

    def with_outputs(self, outputs: int) -> nn.Module:
        """The network with so many outputs, with new weights."""
        network: Any = super().with_outputs(outputs)
        network.conv_stem.stride = (1, 1)
        built: nn.Module = network
        return built


class ViTTiny(Cifar10Classifier):
    """timm's ViT-Tiny with patches of 4 × 4."""

    network = "timm:vit_tiny_patch16_224"
    arguments: ClassVar[Mapping[str, Any]] = {"img_size": SIZE, "patch_size": 4}
    recipe = ADAMW


class ViTSmall(ViTTiny):
    """timm's ViT-Small with patches of 4 × 4."""

    network = "timm:vit_small_patch16_224"


class ViTBase(ViTTiny):
    """timm's ViT-Base with patches of 4 × 4."""

    network = "timm:vit_base_patch16_224"


class ConvNextAtto(Cifar10Classifier):
    """timm's ConvNeXt-Atto, whose first convolution takes patches of 2 × 2."""

    network = "timm:convnext_atto"
    arguments: ClassVar[Mapping[str, Any]] = {"patch_size": 2}
    recipe = ADAMW


class ConvNextLarge(ConvNextAtto):
    """timm's ConvNeXt-Large, 196 million parameters, whose first convolution takes patches of 2 × 2."""

    network = "timm:convnext_large"
