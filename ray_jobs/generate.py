"""Stage `generate`: Ray Data's actors make networks for unseen and for seen tasks.

python -m ray_jobs.generate CONFIG [key=value …]
"""

import random
import sys
from dataclasses import replace
from functools import cached_property

import ray.data
import torch

from ray_jobs.even_parts import evenly
from ray_jobs.judging import family_inputs
from ray_jobs.loading import load_collection, load_generator
from ray_jobs.ray_data import Row, map_rows, returns_errors
from ray_jobs.recomputed_batchnorm import RecomputedBatchNorm, check_recomputed_batchnorm
from ray_jobs.refine import REFINE
from ray_jobs.resources import generation_request, generation_workers
from ray_jobs.run_paths import RunPaths
from ray_jobs.stage import Stage, stage_main
from rpg.collection.collection import Collection
from rpg.commands.progress import stage_progress
from rpg.config import (
    ConditionKind,
    Config,
    RayConfig,
    SamplingConfig,
    generator_config_from_yaml,
    save_config,
    validate_sampling,
)
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.generator.saving import CONFIG_FILE
from rpg.sampling.generate import run_job
from rpg.sampling.job import GenerationJob
from rpg.storage.directories import replacing_directory
from rpg.storage.files import write_json
from rpg.storage.locations import AnyPath, fetched

JOB_FILE = "job.json"


def run(config: Config) -> None:
    """Generate networks for tasks that the generator has not seen, and for some that it has."""
    paths = RunPaths.of(config)
    unseen, seen = chosen_conditions(load_collection(paths.collection), config)
    conditions = [*unseen, *seen] or None
    number = config.generate.models_per_task
    job = GenerationJob(conditions, number, config.seed, config.generator.sampling)
    most = config.generate.models_per_batch
    workers = min(generation_workers(config), -(-len(job) // most))
    batches = evenly(range(len(job)), most, workers)
    with stage_progress("generate") as display, replacing_directory(paths.generated) as directory:
        display.update(0, len(job))
        done = 0

        def finished(row: Row) -> None:
            nonlocal done
            done += len(batches[int(row["index"])])
            display.update(done, len(job))

        made = map_rows(
            [{"index": i, "models": list(batch)} for i, batch in enumerate(batches)],
            _GenerationWorker,
            finished,
            fn_constructor_args=(paths.generator, job, directory, config.ray, RecomputedBatchNorm.of(config)),
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=1,
            num_gpus=1 if config.ray.use_gpu else 0,
        )
        models = [
            {
                "file": file,
                "condition": job.condition_of(i),
                "split": "unseen" if i // number < len(unseen) else "seen",
            }
            for i, file in enumerate(str(name) for row in made for name in row["files"])
        ]
        write_json(directory / JOB_FILE, {"seed": config.seed, "models": models})
    _set_default_sampling(paths.generator, config.generator.sampling)


def check(config: Config) -> None:
    """Refuse sampling settings that do not fit the generator, and networks without BatchNorm to recompute."""
    validate_sampling(config.generator.sampling, config.generator, prefix="generator.sampling.")
    if config.generate.recompute_batchnorm:
        check_recomputed_batchnorm(config)


def _set_default_sampling(generator: AnyPath, sampling: SamplingConfig) -> None:
    """Make `sampling` the default of a saved generator: users then get networks like those of the report."""
    with fetched(generator / CONFIG_FILE) as file:
        saved = generator_config_from_yaml(file)
    if saved.sampling != sampling:
        save_config(replace(saved, sampling=sampling), generator / CONFIG_FILE)


def chosen_conditions(collection: Collection, config: Config) -> tuple[list[list[float]], list[list[float]]]:
    """The conditions of unseen tasks and of seen tasks to generate for.

    The unseen ones are all tasks of `generate.split`; of the training tasks, `generate.seen_tasks` are drawn.
    Both lists are empty for a generator that takes no conditions.

    Raises:
        RPGError: if there is nothing to generate for.
    """
    if config.generator.condition.kind != ConditionKind.vector or collection.condition_width is None:
        return [], []
    unseen, train = collection.tasks(config.generate.split), collection.tasks("train")
    seen = random.Random(config.seed).sample(train, min(config.generate.seen_tasks, len(train)))
    if not unseen and not seen:
        raise RPGError(
            f"{collection.root}: no tasks to generate for: none of split {config.generate.split} that no "
            "generator learns from, and generate.seen_tasks is 0"
        )
    return unseen, seen


class _GenerationWorker:
    """An actor that holds the generator and makes batches of the job's models."""

    def __init__(
        self,
        generator: AnyPath,
        job: GenerationJob,
        directory: AnyPath,
        config: RayConfig,
        batchnorm: RecomputedBatchNorm | None,
    ) -> None:
        self.path = generator
        self.job = job
        self.directory = directory
        self.config = config
        self.batchnorm = batchnorm

    @cached_property
    def generator(self) -> Generator:
        """The generator, loaded at the first batch, because an error can be returned only from there."""
        if self.config.use_gpu:
            return load_generator(self.path, self.config).to("cuda")
        torch.set_num_threads(1)
        return load_generator(self.path, self.config)

    @returns_errors
    def __call__(self, row: Row) -> Row:
        paths = run_job(self.generator, self.job, [int(i) for i in row["models"]], self.directory)
        if self.batchnorm:
            companions = self.generator.layout.companions
            self.batchnorm.rewrite([companions.weights_path(path) for path in paths])
        return {"index": row["index"], "files": [path.name for path in paths]}


GENERATE = Stage(
    name="generate",
    run=run,
    sections=("seed", "generate", "generator.sampling"),
    after=REFINE,
    ignored=("generate.models_per_batch",),
    further=lambda config: family_inputs(config) if config.generate.recompute_batchnorm else {},
    resources=generation_request,
    check=check,
    outputs=lambda paths: [paths.generated / JOB_FILE],
)

if __name__ == "__main__":
    sys.exit(stage_main("generate"))
