"""Task families: the networks and data sets that `collect.family` can name."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from rpg.collection.collection import FAMILY, Collection
from rpg.config import CollectConfig
from rpg.errors import RPGError
from rpg.tasks.binary_cifar10 import BinaryCifar10
from rpg.tasks.binary_digits import BinaryDigits


class TaskFamily(Protocol):
    """The binary classification tasks of one data set, and networks that are fine-tuned for them."""

    uses_gpu: bool
    """Whether its networks are trained and run on a GPU if there is one."""
    copies_share_order: bool
    """Whether the models of one copy see the same images in the same order. If so, the copy's number is their
    permutation state."""

    def check_images(self) -> None:
        """Check that the images are there, before any work is done.

        Raises:
            RPGError: naming the setting or file that is missing.
        """

    def train_backbone(self, config: CollectConfig, seed: int) -> dict[str, Tensor]:
        """The state dict of the network from which all others are fine-tuned."""

    def fine_tune(
        self, backbone: dict[str, Tensor], models: list[tuple[int, int]], config: CollectConfig, seed: int
    ) -> list[dict[str, Tensor]]:
        """Fine-tune a model for each (task, copy): state dicts on the CPU, in the order of `models`."""

    def build_network(self) -> nn.Module:
        """A plain PyTorch network that checkpoints of the family load into."""

    def labels(self, conditions: Sequence[Sequence[float]], split: str) -> Tensor:
        """The right answers to the tasks with these conditions, bool [conditions, images]."""

    def predict(self, models: list[dict[str, Tensor]], split: str) -> Tensor:
        """The models' answers on a split's images, bool [models, images], on the CPU."""


FAMILIES = ("cifar10", "digits")


def task_family(name: str, images: str = "", device: torch.device | None = None) -> TaskFamily:
    """The family called `name`.

    Args:
        name: one of `FAMILIES`.
        images: directory or URI of the images, the setting `collect.images`, for families that need them.
        device: where networks are trained and run, for families that use GPUs; None: the CPU.

    Raises:
        RPGError: if there is none.
    """
    if name == "digits":
        return BinaryDigits()
    if name == "cifar10":
        return BinaryCifar10(images, device or torch.device("cpu"))
    raise RPGError(f"collect.family: expected one of {', '.join(FAMILIES)}, got '{name}'")


def family_of(collection: Collection) -> str:
    """Name of the family whose networks and conditions a collection has, so that accuracies can be computed.

    Raises:
        RPGError: if the collection names no family, or its conditions are not those of a family.
    """
    if collection.encoder:
        raise RPGError(f"{collection.root}: its conditions are descriptions, which do not say what is right")
    if FAMILY not in collection.architecture:
        raise RPGError(f"{collection.root}: does not say which task family its networks belong to")
    if collection.condition_width is None:
        raise RPGError(f"{collection.root}: its checkpoints have no conditions that say what is right")
    return str(collection.architecture[FAMILY])
