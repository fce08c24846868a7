"""Stage `generate`, as an option: BatchNorm's statistics in generated files are those of training data."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ray_jobs.judging import JudgeSettings
from ray_jobs.loading import load_collection
from ray_jobs.run_paths import RunPaths
from rpg.config import Config
from rpg.errors import RPGError
from rpg.evaluation.judge import Candidate, FamilyJudge, Judge
from rpg.seeds import derived_seed
from rpg.storage.files import replacing_file
from rpg.storage.locations import AnyPath, fetched

METADATA = {"rpg.batchnorm": "recomputed"}
"""What such files say beside their provenance."""


@dataclass(frozen=True)
class RecomputedBatchNorm:
    """All that a worker needs to recompute the statistics of generated networks."""

    settings: JudgeSettings
    seed: int

    @classmethod
    def of(cls, config: Config) -> "RecomputedBatchNorm | None":
        """What a run's config asks for; None: networks keep the statistics that were generated.

        Raises:
            RPGError: if no task family is named.
        """
        if not config.generate.recompute_batchnorm:
            return None
        paths = RunPaths.of(config)
        settings = JudgeSettings.of(config, load_collection(paths.collection))
        return cls(settings, derived_seed(config.seed, "BatchNorm", 0))

    def rewrite(self, files: Sequence[AnyPath]) -> None:
        """Replace the statistics in files of weights, each as a whole or not at all.

        Raises:
            RPGError: naming the file, if the statistics cannot be computed or it cannot be written.
        """
        judge = self._judge()
        for path in files:
            with fetched(path) as local, safe_open(local, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            done, failures = judge.with_batchnorm_recomputed([Candidate(path.name, tensors, None)], self.seed)
            if failures:
                raise RPGError(failures[0])
            with replacing_file(path) as temporary:
                save_file(done[0].state_dict, temporary, metadata | METADATA)

    def _judge(self) -> FamilyJudge:
        return _checked(self.settings.open(torch.device("cuda") if self.settings.use_gpu else None))


def check_recomputed_batchnorm(config: Config) -> None:
    """Check that there are statistics to replace, and training data to compute them from.

    Raises:
        RPGError: if not.
    """
    if config.tasks or config.evaluate.command:
        _checked(JudgeSettings.of(config, None).open())


def _checked(judge: Judge) -> FamilyJudge:
    if not isinstance(judge, FamilyJudge):
        raise RPGError("generate.recompute_batchnorm: expected a task family, got evaluate.command")
    if not judge.can_recompute_batchnorm:
        raise RPGError(
            f"generate.recompute_batchnorm: '{judge.name}' has no method batch, or networks without "
            "BatchNorm's running statistics"
        )
    return judge
