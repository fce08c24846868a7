"""The task families that collections can be made from, by the name in `collect.family`."""

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
    """What a family offers; see `rpg/tasks/binary_digits.py` for each method."""

    uses_gpu: bool
    """Whether its networks are trained and run on a GPU where there is one."""
    copies_share_order: bool
    """Whether the models of one copy see the same images in the same order: it is their permutation state."""

    def check_images(self) -> None:
        """Raise an `RPGError` if its images are not where they should be, before any work is done."""

    def train_backbone(self, config: CollectConfig, seed: int) -> dict[str, Tensor]:
        """The network that all others are fine-tuned from."""

    def fine_tune(
        self, backbone: dict[str, Tensor], models: list[tuple[int, int]], config: CollectConfig, seed: int
    ) -> list[dict[str, Tensor]]:
        """Fine-tune the models (task, copy)."""

    def build_network(self) -> nn.Module:
        """The plain network that checkpoints load into."""

    def labels(self, conditions: Sequence[Sequence[float]], split: str) -> Tensor:
        """Right answers of the tasks that conditions name, bool [conditions, images]."""

    def predict(self, models: list[dict[str, Tensor]], split: str) -> Tensor:
        """The models' answers, bool [models, images]."""


FAMILIES = ("cifar10", "digits")


def task_family(name: str, images: str = "", device: torch.device | None = None) -> TaskFamily:
    """The family called `name`.

    Args:
        name: one of `FAMILIES`.
        images: where the images lie, the setting `collect.images`, for families that need some.
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
    """Name of the family whose networks a collection holds, and whose conditions say which answers are right.

    Raises:
        RPGError: if the collection names none, or its conditions are not a family's.
    """
    if collection.encoder:
        raise RPGError(f"{collection.root}: its conditions are descriptions, which do not say what is right")
    if FAMILY not in collection.architecture:
        raise RPGError(f"{collection.root}: does not say which task family its networks belong to")
    if collection.condition_width is None:
        raise RPGError(f"{collection.root}: its checkpoints have no conditions that say what is right")
    return str(collection.architecture[FAMILY])
