"""Stage `collect`: fine-tune networks for every task of a family, side by side, as Ray tasks.

python -m ray_jobs.collect CONFIG [key=value …]
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import ray
import torch
from torch import Tensor

from ray_jobs.loading import load_collection
from ray_jobs.resources import ResourceRequest
from ray_jobs.run_paths import RunPaths
from ray_jobs.stage import Stage, stage_main
from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.collection import COLLECTION_FILE, FAMILY, Collection, Entry
from rpg.commands.progress import stage_progress
from rpg.config import CollectConfig, Config
from rpg.errors import RPGError
from rpg.storage.directories import replacing_directory
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import replacing_file, sha256
from rpg.storage.locations import AnyPath, exists
from rpg.tasks.class_subsets import class_bits, task_splits
from rpg.tasks.families import TaskFamily, family_of, task_family

_WRITERS = 4


def run(config: Config) -> None:
    """Train a collection of networks, or check the one that is there."""
    paths = RunPaths.of(config)
    if config.collect.directory:
        load_collection(paths.collection)
        return
    splits = task_splits(config.collect.validation_tasks, config.seed)
    copies = range(config.collect.checkpoints_per_task)
    models = [(task, copy) for task in splits for copy in copies]
    batches = [
        [(task, copy) for task in tasks]
        for copy in copies
        for tasks in _evenly(list(splits), config.collect.models_per_batch)
    ]
    resources = {"num_cpus": 1, "num_gpus": int(_uses_gpu(config))}
    shared = (replace(config.collect, images=paths.images), config.seed, _uses_gpu(config))
    with stage_progress("collect") as display, replacing_directory(paths.collection) as directory:
        display.update(0, len(models), "backbone")
        backbone = _train_backbone.options(**resources).remote(*shared)
        fine_tune = _fine_tune.options(**resources)
        waiting = [fine_tune.remote(*shared, backbone, batch, directory) for batch in batches]
        batch_of = dict(zip(waiting, batches, strict=True))
        entries: dict[tuple[int, int], Entry] = {}
        while waiting:
            [finished], waiting = ray.wait(waiting, num_returns=1)
            for model, entry in zip(batch_of[finished], ray.get(finished), strict=True):
                entry["split"] = splits[model[0]]
                entries[model] = Entry(**entry)
            display.update(len(entries), len(models), _mean_accuracy(list(entries.values())))
        architecture = {FAMILY: config.collect.family}
        Collection(directory, architecture, [entries[model] for model in models]).save()


def check(config: Config) -> None:
    """Refuse a family, images, splits or an output that networks cannot be trained for."""
    if not config.collect.directory:
        paths = RunPaths.of(config)
        task_family(config.collect.family, paths.images).check_images()
        task_splits(config.collect.validation_tasks, config.seed)
        _refuse_foreign_files(paths.collection)


def family_name(config: Config) -> str:
    """The task family that the networks of a run's collection belong to.

    Raises:
        RPGError: if the collection is the user's and does not say.
    """
    if not config.collect.directory:
        return config.collect.family
    return family_of(load_collection(RunPaths.of(config).collection))


def _refuse_foreign_files(directory: AnyPath) -> None:
    """Refuse to replace the directory of the collection if it holds files that this stage did not make."""
    with storage_errors_for(directory):
        is_empty = not directory.is_dir() or not any(directory.iterdir())
    if not is_empty:
        record = directory / COLLECTION_FILE
        if not exists(record) or FAMILY not in load_collection(directory).architecture:
            raise RPGError(
                f"{directory}: holds files that this job did not make and would replace; "
                "choose another output, or use them with collect.directory"
            )


# The tasks are declared without GPUs and get them by `options`: then Ray keeps a GPU's worker from one task
# to the next. Starting a worker and reading the images takes longer than many of the tasks.
@ray.remote
def _train_backbone(config: CollectConfig, seed: int, use_gpu: bool) -> dict[str, Tensor]:
    return _family(config, use_gpu).train_backbone(config, seed)


@ray.remote
def _fine_tune(
    config: CollectConfig,
    seed: int,
    use_gpu: bool,
    backbone: dict[str, Tensor],
    models: list[tuple[int, int]],
    directory: AnyPath,
) -> list[dict[str, object]]:
    family = _family(config, use_gpu)
    state_dicts = family.fine_tune(backbone, models, config, seed)
    conditions = [class_bits(task) for task, _ in models]
    right = family.predict(state_dicts, "validation") == family.labels(conditions, "validation")
    accuracies = right.float().mean(1).tolist()

    def write(index: int) -> dict[str, object]:
        task, copy = models[index]
        path = directory / f"task{task:04d}_copy{copy}.safetensors"
        with replacing_file(path) as temporary:
            write_checkpoint(temporary, state_dicts[index], {"format": "pt"})
            digest = sha256(temporary)
        metrics = {"validation_accuracy": accuracies[index]}
        state = copy if family.copies_share_order else None
        return asdict(Entry(path.name, digest, conditions[index], metrics, state=state))

    # Writing mostly waits for the disk, which threads can do at the same time.
    with ThreadPoolExecutor(_WRITERS) as pool:
        entries = list(pool.map(write, range(len(models))))
    if use_gpu:
        # The process stays for a while, and the next stage needs the GPU's memory.
        torch.cuda.empty_cache()
    return entries


def _family(config: CollectConfig, use_gpu: bool) -> TaskFamily:
    torch.set_num_threads(1)
    return task_family(config.family, config.images, torch.device("cuda" if use_gpu else "cpu"))


def _evenly(tasks: list[int], most: int) -> list[list[int]]:
    """Cut `tasks` into as few parts of at most `most` as possible; the sizes differ by at most one."""
    parts = -(-len(tasks) // most)
    return [tasks[len(tasks) * i // parts : len(tasks) * (i + 1) // parts] for i in range(parts)]


def _uses_gpu(config: Config) -> bool:
    return config.ray.use_gpu and task_family(config.collect.family).uses_gpu


def _resources(config: Config) -> ResourceRequest | None:
    if config.collect.directory or not _uses_gpu(config):
        return None
    return ResourceRequest("collecting", 1, "ray.use_gpu=true", use_gpu=True)


def _mean_accuracy(entries: list[Entry]) -> str:
    mean = sum(entry.metrics["validation_accuracy"] for entry in entries) / len(entries)
    return f"validation accuracy {mean:.3f}"


COLLECT = Stage(
    name="collect",
    run=run,
    sections=("seed", "collect"),
    after=None,
    resources=_resources,
    outputs=lambda paths: [paths.collection / COLLECTION_FILE],
    distinguishing=lambda paths: paths.collection / COLLECTION_FILE,
    check=check,
    given=lambda config: (
        RunPaths.of(config).collection / COLLECTION_FILE if config.collect.directory else None
    ),
)

if __name__ == "__main__":
    sys.exit(stage_main("collect"))
