"""What a generator is refined by: a task family's loss, in the tasks of the training checkpoints."""

from dataclasses import dataclass

import torch

from ray_jobs.loading import load_collection
from ray_jobs.run_paths import RunPaths
from rpg.collection.collection import Collection
from rpg.config import ConditionKind, Config
from rpg.errors import RPGError
from rpg.storage.locations import AnyPath
from rpg.tasks.families import Asked, family_of, load_family, uses_gpu
from rpg.tasks.task_loss import TaskLoss, TrainingTasks


@dataclass(frozen=True)
class RefiningTasks:
    """All that a worker needs, whatever directory it runs in."""

    fitted: AnyPath
    """Directory of the generator as it was fitted."""
    family: str
    images: str
    tasks: TrainingTasks

    @classmethod
    def of(cls, config: Config, fitted: AnyPath) -> "RefiningTasks":
        """What the generator in the directory `fitted` is refined by in the run of `config`.

        Raises:
            RPGError: if there is no family.
        """
        paths = RunPaths.of(config)
        collection = load_collection(paths.collection)
        family = _family(config, collection)
        return cls(fitted, family, paths.images, _training_tasks(config, collection))

    def loss(self, device: torch.device) -> TaskLoss:
        """The family's loss, on `device` if it is a GPU that the family uses, or else on the CPU."""
        of_networks = device if uses_gpu(self.family) else torch.device("cpu")
        return TaskLoss(load_family(self.family, self.images, of_networks), self.family, of_networks)


def check_refining(config: Config) -> None:
    """Refuse a family that generators cannot be refined by, before any work is done.

    Raises:
        RPGError: if there is none, or it has no loss.
    """
    paths = RunPaths.of(config)
    collection = load_collection(paths.collection) if config.collect.directory else None
    name = _family(config, collection)
    TaskLoss(load_family(name, paths.images), name, torch.device("cpu"))


def _family(config: Config, collection: Collection | None) -> str:
    """The family that `tasks` names, or the collection."""
    try:
        if name := RunPaths.of(config).tasks:
            return name
        if collection is None:
            raise RPGError("tasks: expected a task family, such as digits or my_tasks.py:MyTasks")
        return family_of(collection)
    except RPGError as error:
        raise RPGError(f"{error}; without refining: refine.steps=0") from error


def _training_tasks(config: Config, collection: Collection) -> TrainingTasks:
    """The tasks of the training checkpoints, each once, in the order of the collection."""
    if config.generator.condition.kind != ConditionKind.vector:
        return TrainingTasks(None, [None])
    conditions, texts = collection.tasks("train"), collection.descriptions
    asked: list[Asked] = [texts.get(tuple(each), each) for each in conditions]
    return TrainingTasks(torch.tensor(conditions), asked)
