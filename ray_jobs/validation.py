"""Accuracy of networks generated for the validation tasks, by which generators and settings are chosen."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.run_paths import RunPaths
from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.collection import Collection
from rpg.config import ConditionKind, Config
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.generate import generate_models
from rpg.tasks.families import family_of, task_family


@dataclass(frozen=True)
class ValidationTasks:
    """Tasks that no generator is trained on and no report is about."""

    family: str
    images: str
    conditions: list[list[float]]
    models_per_task: int
    seed: int

    @classmethod
    def of(cls, config: Config, collection: Collection) -> "ValidationTasks":
        """The validation tasks of a collection.

        Raises:
            RPGError: if it has none, or they cannot be evaluated.
        """
        conditions = collection.tasks("validation")
        is_vector = config.generator.condition.kind == ConditionKind.vector
        try:
            family = family_of(collection)
            if not conditions or not is_vector:
                raise RPGError(
                    f"{collection.root}: expected a generator of condition vectors, and tasks of split "
                    "'validation' that no generator learns from"
                )
        except RPGError as error:
            raise RPGError(f"{error}; without validation: train.validate_every=0") from error
        images = RunPaths.of(config).images
        task_family(family, images).check_images()
        return cls(family, images, conditions, config.train.validation_models, config.seed)

    def accuracy(self, generator: Generator) -> float:
        """Mean accuracy, on the validation images, of networks that `generator` makes for the tasks."""
        family = task_family(self.family, self.images, generator.positions.device)
        with tempfile.TemporaryDirectory() as directory:
            sampling = generator.config.sampling
            files = generate_models(
                generator, self.conditions, self.models_per_task, self.seed, Path(directory), sampling
            )
            models = [read_checkpoint(file) for file in files]
        asked = [condition for condition in self.conditions for _ in range(self.models_per_task)]
        right = family.predict(models, "validation") == family.labels(asked, "validation")
        return float(right.float().mean())
