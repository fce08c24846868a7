"""Stage `evaluate`: accuracy on held-out images, baselines, similarity, and the report.

python -m ray_jobs.evaluate CONFIG [key=value …]
"""

import sys
import time
from collections.abc import Sequence

import ray
import torch
from rich.console import Console

from ray_jobs.collect import family_name
from ray_jobs.generate import GENERATE, JOB_FILE, chosen_conditions
from ray_jobs.loading import load_collection, load_generator, open_shards
from ray_jobs.resources import ResourceRequest, cpus_per_worker, node_resources
from ray_jobs.run_paths import RunPaths
from ray_jobs.stage import Stage, stage_main, stage_seconds, with_stages_before
from ray_jobs.training.checkpoints import HISTORY_FILE
from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.collection import Collection
from rpg.collection.shards import ShardedCollection
from rpg.commands.progress import stage_progress
from rpg.config import ConditionKind, Config, Split, to_plain
from rpg.errors import RPGError
from rpg.evaluation.measure import Measured, Network, TrainingSet, measure
from rpg.evaluation.results import Results, TaskSplit, versions
from rpg.generator.saving import CARD_FILE
from rpg.storage.files import read_json, write_text
from rpg.tasks.class_subsets import task_name
from rpg.tasks.families import family_of, task_family

_SLEEPING_THREADS = {"env_vars": {"OMP_WAIT_POLICY": "passive"}}
"""Threads of a task sleep while they wait for each other. Otherwise they keep their CPUs busy while waiting.
Where these CPUs have other work as well (two such tasks of 64 threads on one machine), 20 seconds of
evaluation then become five minutes."""
REPORT_FILE = "report.json"
REPORT_PAGE = "report.html"


def run(config: Config) -> None:
    """Evaluate the generated networks and write the report."""
    # Every stage's job imports this module, and Matplotlib takes as long to import as all the rest of it.
    from rpg.evaluation.figures import to_svg
    from rpg.evaluation.report import (
        build_report,
        figure_pairs,
        model_card_table,
        terminal_table,
        write_report,
    )

    began = time.perf_counter()
    paths = RunPaths.of(config)
    if (reason := why_not_evaluated(config)) is not None:
        raise RPGError(f"{paths.generated}: {reason}")
    with stage_progress("evaluate") as display:
        display.update(0, 2, f"networks on {_image_split(config)} images")
        measured = _measure_on_gpu(config) if _uses_gpu(config) else _measure(config, torch.device("cpu"))
        display.update(1, 2, "report")
        history = read_json(paths.generator / HISTORY_FILE, "a training history")
        seconds = {stage.name: stage_seconds(stage, config) for stage in with_stages_before(GENERATE)}
        results = Results(
            name=config.name,
            seed=config.seed,
            config=to_plain(config),
            versions=versions(),
            timing_seconds={**seconds, "evaluate": time.perf_counter() - began},
            originals=measured.originals,
            generated=measured.generated,
            noised=measured.noised,
            baselines=measured.baselines,
            sibling_distances=measured.sibling_distances,
            losses=[(int(row["step"]), float(row["loss"])) for row in history],
        )
        report = build_report(results)
        write_report(paths.root, report, figure_pairs(results, to_svg))
        generator = load_generator(paths.generator, config.ray)
        write_text(paths.generator / CARD_FILE, generator.card(model_card_table(report)))
        display.update(2, 2)
    Console().print(terminal_table(report))


def check(config: Config) -> None:
    """Refuse images that are not there, unless there is nothing to evaluate anyway."""
    if why_not_evaluated(config) is None:
        task_family(family_name(config), RunPaths.of(config).images).check_images()


def why_not_evaluated(config: Config) -> str | None:
    """The reason why this run's networks cannot be evaluated; None if they can."""
    if config.generator.condition.kind != ConditionKind.vector:
        return "networks generated without a condition have no task to be evaluated on"
    if not config.collect.directory:
        return None
    collection = load_collection(RunPaths.of(config).collection)
    try:
        family_of(collection)
    except RPGError as error:
        return str(error)
    return None


def _measure_on_gpu(config: Config) -> Measured:
    """Run `_measure` as a Ray task where there is a GPU."""
    cpus = cpus_per_worker(node_resources(), 1, use_gpu=True)

    @ray.remote(num_cpus=cpus, num_gpus=1, runtime_env=_SLEEPING_THREADS)
    def measured() -> Measured:
        torch.set_num_threads(cpus)
        return _measure(config, torch.device("cuda"))

    result: Measured = ray.get(measured.remote())
    return result


def _measure(config: Config, device: torch.device) -> Measured:
    """Measure the run's networks for the report."""
    paths = RunPaths.of(config)
    family = task_family(family_name(config), paths.images, device)
    images = _image_split(config)
    originals, generated = _networks(config, load_collection(paths.collection), paths)
    shards = open_shards(paths.shards, config.ray)
    return measure(
        shards.layout, _training_set(shards), originals, generated,
        predict=lambda models: family.predict(models, images),
        labels=lambda conditions: family.labels(conditions, images),
        task_name=task_name,
        noise_levels=config.evaluate.noise_levels,
        ridge_penalty=config.evaluate.ridge_penalty,
        seed=config.seed,
    )  # fmt: skip


def _image_split(config: Config) -> str:
    """The images that the networks are evaluated on.

    Networks for held-out tasks take the test images, by which nothing was chosen. Settings are chosen by
    networks for validation tasks, on the validation images.
    """
    return "test" if config.generate.split == Split.heldout else "validation"


def _uses_gpu(config: Config) -> bool:
    return config.ray.use_gpu and task_family(family_name(config)).uses_gpu


def _resources(config: Config) -> ResourceRequest | None:
    if not _uses_gpu(config):
        return None
    return ResourceRequest("evaluation", 1, "ray.use_gpu=true", use_gpu=True)


def _networks(config: Config, collection: Collection, paths: RunPaths) -> tuple[list[Network], list[Network]]:
    unseen, seen = chosen_conditions(collection, config)
    splits = {tuple(condition): TaskSplit.seen for condition in seen}
    splits |= {tuple(condition): TaskSplit.unseen for condition in unseen}
    originals = []
    for entry in collection.entries:
        condition = tuple(entry.condition or ())
        if condition in splits:
            state_dict = collection.read_checked(entry)
            originals.append(Network(entry.file, condition, splits[condition], state_dict))
    job = read_json(paths.generated / JOB_FILE, "a generation job")
    generated = [
        Network(
            model["file"], tuple(model["condition"]), TaskSplit(model["split"]),
            read_checkpoint(paths.generated / model["file"]),
        )
        for model in job["models"]
    ]  # fmt: skip
    return originals, generated


def _training_set(shards: ShardedCollection) -> TrainingSet:
    everything = range(shards.layout.tokens)
    mask = shards.layout.mask()
    values = torch.stack([shards.read(i, everything)[mask] for i in range(len(shards))])
    assert shards.conditions is not None
    conditions: Sequence[Sequence[float]] = shards.conditions.tolist()
    return TrainingSet(values, [tuple(condition) for condition in conditions])


EVALUATE = Stage(
    name="evaluate",
    run=run,
    sections=("evaluate",),
    after=GENERATE,
    resources=_resources,
    check=check,
    outputs=lambda paths: [paths.root / REPORT_FILE, paths.root / REPORT_PAGE],
)

if __name__ == "__main__":
    sys.exit(stage_main("evaluate"))
