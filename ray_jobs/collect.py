"""Stage `collect`: fine-tune networks for every task of a family, side by side, as Ray tasks.

python -m ray_jobs.collect CONFIG [key=value …]
"""

import sys
from dataclasses import asdict

import ray
import torch
from torch import Tensor

from ray_jobs.progress import stage_progress
from ray_jobs.run_paths import RunPaths
from ray_jobs.stage import Stage, stage_main
from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.collection import COLLECTION_FILE, Collection, Entry
from rpg.config import CollectConfig, Config
from rpg.errors import RPGError
from rpg.files import AnyPath, replacing_directory, replacing_file, sha256
from rpg.storage import exists
from rpg.storage_errors import naming
from rpg.tasks.class_subsets import class_bits, task_splits
from rpg.tasks.families import FAMILY, task_family


def run(config: Config) -> None:
    """Train a collection of networks, or check the one that is there."""
    paths = RunPaths.of(config)
    if config.collect.directory:
        Collection.load(paths.collection)
        return
    task_family(config.collect.family)
    refuse_foreign(paths.collection)
    splits = task_splits(config.collect.validation_tasks, config.seed)
    models = [(task, copy) for task in splits for copy in range(config.collect.checkpoints_per_task)]
    size = config.collect.models_per_batch
    batches = [models[i : i + size] for i in range(0, len(models), size)]
    with stage_progress("collect") as progress, replacing_directory(paths.collection) as directory:
        progress.update(0, len(models), "backbone")
        backbone = _train_backbone.remote(config.collect, config.seed)
        waiting = [
            _fine_tune.remote(backbone, batch, config.collect, config.seed, directory) for batch in batches
        ]
        batch_of = dict(zip(waiting, batches, strict=True))
        entries: dict[tuple[int, int], Entry] = {}
        while waiting:
            [finished], waiting = ray.wait(waiting, num_returns=1)
            for model, entry in zip(batch_of[finished], ray.get(finished), strict=True):
                entry["split"] = splits[model[0]]
                entries[model] = Entry(**entry)
            progress.update(len(entries), len(models), _mean_accuracy(list(entries.values())))
        architecture = {FAMILY: config.collect.family}
        Collection(directory, architecture, [entries[model] for model in models]).save()


def refuse_foreign(directory: AnyPath) -> None:
    """Training a collection replaces the directory: not one that this stage did not make.

    Raises:
        RPGError: if there is something else in it.
    """
    with naming(directory):
        is_empty = not directory.is_dir() or not any(directory.iterdir())
    if not is_empty:
        record = directory / COLLECTION_FILE
        if not exists(record) or FAMILY not in Collection.load(directory).architecture:
            raise RPGError(
                f"{directory}: holds files that this job did not make and would replace; "
                "choose another output, or use them with collect.directory"
            )


@ray.remote(num_cpus=1)
def _train_backbone(config: CollectConfig, seed: int) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    return task_family(config.family).train_backbone(config, seed)


@ray.remote(num_cpus=1)
def _fine_tune(
    backbone: dict[str, Tensor],
    models: list[tuple[int, int]],
    config: CollectConfig,
    seed: int,
    directory: AnyPath,
) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    family = task_family(config.family)
    state_dicts = family.fine_tune(backbone, models, config, seed)
    conditions = [class_bits(task) for task, _ in models]
    right = family.predict(state_dicts, "validation") == family.labels(conditions, "validation")
    entries = []
    for (task, copy), condition, state_dict, accuracy in zip(
        models, conditions, state_dicts, right.float().mean(1).tolist(), strict=True
    ):
        path = directory / f"task{task:04d}_copy{copy}.safetensors"
        with replacing_file(path) as temporary:
            write_checkpoint(temporary, state_dict, {"format": "pt"})
            digest = sha256(temporary)
        entries.append(asdict(Entry(path.name, digest, condition, {"validation_accuracy": accuracy})))
    return entries


def _mean_accuracy(entries: list[Entry]) -> str:
    mean = sum(entry.metrics["validation_accuracy"] for entry in entries) / len(entries)
    return f"validation accuracy {mean:.3f}"


COLLECT = Stage(
    name="collect",
    run=run,
    sections=("seed", "collect"),
    after=None,
    outputs=lambda paths: [paths.collection / COLLECTION_FILE],
    given=lambda config: (
        RunPaths.of(config).collection / COLLECTION_FILE if config.collect.directory else None
    ),
)

if __name__ == "__main__":
    sys.exit(stage_main("collect"))
