"""Scores of networks generated for the validation tasks, by which generators and settings are chosen."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from ray_jobs.judging import JudgeSettings
from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.collection import Collection
from rpg.config import ConditionKind, Config
from rpg.errors import RPGError
from rpg.evaluation.judge import Candidate, Judge, metric_that_counts, with_metric
from rpg.generator.generator import Generator
from rpg.sampling.generate import generate_models
from rpg.tasks.families import Metric
from rpg.training.progress import Validation


@dataclass(frozen=True)
class ValidationTasks:
    """Tasks that no generator is trained on and no report is about; for a generator without conditions, the
    one task that there is."""

    judge: JudgeSettings
    higher_is_better: bool
    conditions: list[list[float]] | None
    descriptions: list[str] | None
    """The texts that the conditions stand for, if they stand for some."""
    models_per_task: int
    seed: int
    _judges: dict[str, Judge] = field(default_factory=dict, repr=False, compare=False)
    """What was opened in this process, by device: a family may take seconds to read its data."""

    @classmethod
    def of(cls, config: Config, stage: str, collection: Collection) -> "ValidationTasks":
        """The validation tasks of a collection, for the stage `train` or `refine`.

        Raises:
            RPGError: if it has none, or nothing can measure networks.
        """
        conditions = None
        try:
            settings = JudgeSettings.of(config, collection)
            judge = settings.open()
            judge.check()
            if config.generator.condition.kind == ConditionKind.vector:
                conditions = collection.tasks("validation")
                if not conditions:
                    raise RPGError(
                        f"{collection.root}: expected tasks of split 'validation' that no generator "
                        "learns from"
                    )
        except RPGError as error:
            raise RPGError(f"{error}; without validation: {stage}.validate_every=0") from error
        texts = collection.descriptions
        descriptions = [texts[tuple(condition)] for condition in conditions] if conditions and texts else None
        return cls(
            settings,
            judge.metrics[0].higher_is_better if judge.metrics else True,
            conditions,
            descriptions,
            getattr(config, stage).validation_models,
            config.seed,
        )

    def validate(self, generator: Generator) -> Validation:
        """Mean score, on validation data, of networks that `generator` makes for the tasks."""
        device = generator.positions.device
        judge = self._judges.get(str(device))
        if judge is None:
            judge = self._judges[str(device)] = self.judge.open(device, generator.layout.companions)
        asked = [*(self.descriptions or self.conditions or [None])]
        with tempfile.TemporaryDirectory() as directory:
            sampling = generator.config.sampling
            files = generate_models(
                generator, self.conditions, self.models_per_task, self.seed, Path(directory), sampling
            )
            networks = [
                Candidate(file.name, read_checkpoint(file), asked[index // self.models_per_task])
                for index, file in enumerate(files)
            ]
        measured = judge.measure(networks, "validation")
        # A generator that is barely trained makes networks that cannot be measured. A better one comes later.
        metric = metric_that_counts(judge, measured).name
        measured = with_metric(Metric(metric), [network.name for network in networks], measured)
        if failures := [each.failure for each in measured if each.failure is not None]:
            return Validation(metric, None, failures[0])
        return Validation(metric, sum(each.metrics[metric] for each in measured) / len(measured))
