"""Stage `collect`: networks of a family as Ray tasks: fine-tuned for every task, or along one training run.

python -m ray_jobs.collect CONFIG [key=value …]
"""

import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

import ray
import ray.exceptions
import torch
from torch import Tensor

from ray_jobs.along_training import collect_along_training
from ray_jobs.even_parts import evenly
from ray_jobs.judging import JudgeSettings, family_inputs, family_name, loaded_family
from ray_jobs.loading import load_collection
from ray_jobs.resources import ResourceRequest
from ray_jobs.run_paths import RunPaths
from ray_jobs.stage import Stage, fingerprint, stage_main
from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.collection import COLLECTION_FILE, FAMILY, SPLITS, Collection, Entry
from rpg.commands.progress import stage_progress
from rpg.config import Config, Split
from rpg.encoders import open_encoder
from rpg.errors import RPGError
from rpg.evaluation.judge import Candidate, FamilyJudge
from rpg.storage.directories import replacing_directory
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import replacing_file, sha256
from rpg.storage.locations import AnyPath, exists, fetched
from rpg.tasks.families import Task, calling, can_collect, check_family, has_checkpoints, uses_gpu
from rpg.text_encoder import ENCODER_DIRECTORY, copy_encoder, encoder_digest

_WRITERS = 4
BACKBONE_FILE = "backbone.safetensors"
"""In the collection's directory: what the networks were fine-tuned from."""


def run(config: Config) -> None:
    """Train a collection of networks, or check the one that is there."""
    paths = RunPaths.of(config)
    if config.collect.directory:
        load_collection(paths.collection)
        return
    if has_checkpoints(loaded_family(config)):
        collect_along_training(config, _uses_gpu(config), fingerprint(COLLECT, config)[:16])
        return
    tasks = _tasks(config)
    copies_of = {task.name: _copies(task, config) for task in tasks}
    models = [(task.name, copy) for task in tasks for copy in range(copies_of[task.name])]
    batches = [
        [(task, copy) for task in some]
        for copy in range(max(copies_of.values()))
        for some in evenly(
            [task for task in tasks if copy < copies_of[task.name]], config.collect.models_per_batch
        )
    ]
    # A command measures generated networks. Those that are trained here are the family's.
    judge = JudgeSettings(family_name(config), paths.images, config.evaluate, _uses_gpu(config))
    resources = {"num_cpus": 1, "num_gpus": int(_uses_gpu(config))}
    shared = (config, judge)
    with stage_progress("collect") as display, replacing_directory(paths.collection) as directory:
        display.update(0, len(models), "backbone")
        backbone = _train_backbone.options(**resources).remote(*shared)
        fine_tune = _fine_tune.options(**resources)
        waiting = [fine_tune.remote(*shared, backbone, batch, directory) for batch in batches]
        batch_of = dict(zip(waiting, batches, strict=True))
        entries: dict[tuple[str, int], Entry] = {}
        while waiting:
            [finished], waiting = ray.wait(waiting, num_returns=1)
            for (task, copy), entry in zip(batch_of[finished], _result(finished), strict=True):
                entries[task.name, copy] = Entry(**entry)
            display.update(len(entries), len(models), _mean_metric(list(entries.values())))
        with replacing_file(directory / BACKBONE_FILE) as temporary:
            trained: dict[str, Tensor] = ray.get(backbone)
            write_checkpoint(temporary, trained, {"format": "pt"})
        encoder = None
        if paths.encoder is not None:
            copy_encoder(paths.encoder, directory / ENCODER_DIRECTORY)
            encoder = encoder_digest(directory / ENCODER_DIRECTORY)
        architecture = {FAMILY: config.tasks}
        Collection(directory, architecture, [entries[model] for model in models], encoder).save()


def check(config: Config) -> None:
    """Refuse a family, images, splits or an output that networks cannot be trained for."""
    if not config.collect.directory:
        family = loaded_family(config)
        check_family(family, family_name(config))
        if not has_checkpoints(family):
            _check_encoder(config, _tasks(config))
        elif config.collect.encoder:
            raise RPGError(
                f"collect.encoder: the checkpoints of {family_name(config)} bring conditions of their own; "
                "expected none"
            )
        _refuse_foreign_files(RunPaths.of(config).collection)


def _check_encoder(config: Config, tasks: list[Task]) -> None:
    """Refuse an encoder whose conditions are not like those of the tasks.

    Raises:
        RPGError: naming what the encoder lacks, or the sizes that differ.
    """
    source = RunPaths.of(config).encoder
    if source is None:
        return
    with fetched(source) as local:
        size = open_encoder(local).size
    if size != len(tasks[0].condition):
        raise RPGError(
            f"collect.encoder: {source}: expected conditions of {len(tasks[0].condition)} values, as the "
            f"tasks have, got {size}"
        )


def _copies(task: Task, config: Config) -> int:
    """How many networks are trained for a task."""
    heldout = config.collect.heldout_checkpoints_per_task
    return heldout if heldout and task.split == Split.heldout else config.collect.checkpoints_per_task


def _tasks(config: Config) -> list[Task]:
    """The tasks of the family, in order.

    Raises:
        RPGError: if the family trains no networks, or its tasks are not as `Task` says.
    """
    family, name = loaded_family(config), family_name(config)
    if not can_collect(family):
        raise RPGError(
            f"tasks: '{name}' trains no networks (it lacks a method tasks, backbone or fine_tune); name a "
            "collection that is there with collect.directory"
        )
    with calling(name, "tasks"):
        tasks = list(family.tasks(config.collect.validation_tasks, config.seed))
    if not tasks or not all(isinstance(task, Task) for task in tasks):
        raise RPGError(f"{name}: tasks: expected a list of Task, got {tasks!r:.80}")
    names = [f"{task.name:0>4}" for task in tasks]
    for task in tasks:
        if task.split not in SPLITS or len(task.condition) != len(tasks[0].condition):
            raise RPGError(
                f"{name}: tasks: '{task.name}': expected a split of {', '.join(SPLITS)} and a condition of "
                f"{len(tasks[0].condition)} values, got '{task.split}' and {len(task.condition)} values"
            )
        if not re.fullmatch(r"[\w.-]{1,100}", task.name) or names.count(f"{task.name:0>4}") > 1:
            raise RPGError(
                f"{name}: tasks: expected different names of letters, digits, '_', '-' and '.', "
                f"got {task.name!r:.80}"
            )
    return tasks


def _result(finished: Any) -> list[dict[str, Any]]:
    try:
        entries: list[dict[str, Any]] = ray.get(finished)
        return entries
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RPGError):
            raise error.cause from error
        raise


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
def _train_backbone(config: Config, judge: JudgeSettings) -> dict[str, Tensor]:
    family = _judge(judge).family
    with calling(judge.tasks, "backbone"):
        backbone: dict[str, Tensor] = family.backbone(config.collect, config.seed)
    return backbone


@ray.remote
def _fine_tune(
    config: Config,
    settings: JudgeSettings,
    backbone: dict[str, Tensor],
    models: list[tuple[Task, int]],
    directory: AnyPath,
) -> list[dict[str, object]]:
    judge = _judge(settings)
    with calling(settings.tasks, "fine_tune"):
        state_dicts = judge.family.fine_tune(backbone, models, config.collect, config.seed)
    if not isinstance(state_dicts, Sequence) or len(state_dicts) != len(models):
        got = len(state_dicts) if isinstance(state_dicts, Sequence) else type(state_dicts).__name__
        raise RPGError(f"{settings.tasks}: fine_tune: expected {len(models)} networks, got {got}")
    names = [f"task{task.name:0>4}_copy{copy}.safetensors" for task, copy in models]
    measured = judge.measure(
        [Candidate(*row) for row in zip(names, state_dicts, [t.condition for t, _ in models], strict=True)],
        "validation",
    )
    for each in measured:
        if each.failure is not None:
            raise RPGError(each.failure)

    def write(index: int) -> dict[str, object]:
        task, copy = models[index]
        path = directory / names[index]
        with replacing_file(path) as temporary:
            write_checkpoint(temporary, state_dicts[index], {"format": "pt"})
            digest = sha256(temporary)
        metrics = {f"validation_{name}": value for name, value in measured[index].metrics.items()}
        state = copy if getattr(judge.family, "copies_share_order", False) else None
        return asdict(Entry(path.name, digest, task.condition, metrics, task.split, state=state))

    # Writing mostly waits for the disk, which threads can do at the same time.
    with ThreadPoolExecutor(_WRITERS) as pool:
        entries = list(pool.map(write, range(len(models))))
    if settings.use_gpu:
        # The process stays for a while, and the next stage needs the GPU's memory.
        torch.cuda.empty_cache()
    return entries


def _judge(settings: JudgeSettings) -> FamilyJudge:
    torch.set_num_threads(1)
    device = torch.device("cuda" if settings.use_gpu else "cpu")
    return FamilyJudge(settings.tasks, settings.images, device, settings.evaluate.time_limit)


def _uses_gpu(config: Config) -> bool:
    return config.ray.use_gpu and uses_gpu(family_name(config))


def _encoder(config: Config) -> dict[str, str]:
    """What tells the encoder of descriptions from others."""
    source = RunPaths.of(config).encoder
    return {} if source is None else {"encoder": encoder_digest(source)}


def _resources(config: Config) -> ResourceRequest | None:
    if config.collect.directory or not _uses_gpu(config):
        return None
    return ResourceRequest("collecting", 1, "ray.use_gpu=true", use_gpu=True)


def _mean_metric(entries: list[Entry]) -> str:
    name = next(iter(entries[0].metrics))
    mean = sum(entry.metrics[name] for entry in entries) / len(entries)
    return f"{name.replace('_', ' ')} {mean:.3g}"


COLLECT = Stage(
    name="collect",
    run=run,
    sections=("seed", "collect"),
    # Its content counts, and not its place.
    ignored=("collect.encoder",),
    further=lambda config: {} if config.collect.directory else {**family_inputs(config), **_encoder(config)},
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
