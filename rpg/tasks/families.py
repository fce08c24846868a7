"""The task families that collections can be made from, by the name in `collect.family`."""

from collections.abc import Sequence
from typing import Protocol, cast

from torch import Tensor, nn

from rpg.config import CollectConfig
from rpg.errors import RPGError
from rpg.tasks import binary_digits


class TaskFamily(Protocol):
    """What a family's module offers; see `rpg/tasks/binary_digits.py` for each function."""

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

    def task_name(self, condition: Sequence[float]) -> str:
        """What to call the task that a condition names."""

    def predict(self, models: list[dict[str, Tensor]], split: str) -> Tensor:
        """The models' answers, bool [models, images]."""


FAMILY = "family"
"""Key of a collection's architecture that names the task family of its networks."""

_FAMILIES = {"digits": binary_digits}


def task_family(name: str) -> TaskFamily:
    """The family called `name`.

    Raises:
        RPGError: if there is none.
    """
    if name not in _FAMILIES:
        raise RPGError(f"collect.family: expected one of {', '.join(sorted(_FAMILIES))}, got '{name}'")
    return cast(TaskFamily, _FAMILIES[name])
