"""What a generator is refined by: a task family's loss, in the tasks of the training checkpoints."""

from typing import TYPE_CHECKING

import torch

from ray_jobs.run_paths import RunPaths
from rpg.collection.collection import Collection
from rpg.config import ConditionKind, Config
from rpg.errors import RPGError
from rpg.tasks.families import Asked, family_of, load_family
from rpg.tasks.task_loss import TaskLoss

if TYPE_CHECKING:
    from rpg.training.refining import TrainingTasks


def refining_family(config: Config, collection: Collection | None) -> str:
    """The family whose loss networks are refined by: `tasks`, or the one that the collection names.

    Raises:
        RPGError: if neither names one.
    """
    try:
        if name := RunPaths.of(config).tasks:
            return name
        if collection is None:
            raise RPGError("tasks: expected a task family, such as digits or my_tasks.py:MyTasks")
        return family_of(collection)
    except RPGError as error:
        raise RPGError(f"{error}; without refining: refine.steps=0") from error


def check_refining(config: Config, collection: Collection | None) -> None:
    """Refuse a family that generators cannot be refined by, before any work is done.

    Raises:
        RPGError: if there is none, or it has no loss.
    """
    name = refining_family(config, collection)
    TaskLoss(load_family(name, RunPaths.of(config).images), name, torch.device("cpu"))


def training_tasks(config: Config, collection: Collection) -> "TrainingTasks":
    """The tasks of the training checkpoints, each once, in the order of the collection."""
    from rpg.training.refining import TrainingTasks

    if config.generator.condition.kind != ConditionKind.vector:
        return TrainingTasks(None, [None])
    conditions, texts = collection.tasks("train"), collection.descriptions
    asked: list[Asked] = [texts.get(tuple(each), each) for each in conditions]
    return TrainingTasks(torch.tensor(conditions), asked)
