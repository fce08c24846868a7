"""Stage `collect` for a family whose collection has no conditions: its networks come one after the other."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch

from ray_jobs.judging import JudgeSettings, family_name
from ray_jobs.resources import cpus_per_worker, node_resources
from ray_jobs.run_paths import RunPaths
from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.collection import FAMILY, Collection, Entry
from rpg.commands.progress import ProgressDisplay, stage_progress
from rpg.config import Config
from rpg.errors import RPGError
from rpg.evaluation.judge import Candidate, FamilyJudge
from rpg.storage.directories import replacing_directory
from rpg.storage.files import replacing_file, sha256
from rpg.storage.locations import AnyPath
from rpg.tasks.families import calling

_ATTEMPTS = 3


def collect_along_training(config: Config, use_gpu: bool, name: str) -> None:
    """Have a family train the networks of a collection without conditions, in one Ray task.

    Args:
        config: of the run.
        use_gpu: whether the family trains on a GPU.
        name: stands for all that determines the collection. What training needs to go on after a kill lies
            in a file of this name, in a directory beside the collection, until that is complete.
    """
    paths = RunPaths.of(config)
    judge = JudgeSettings(family_name(config), paths.images, config.evaluate, use_gpu)
    with ExitStack() as stack, stage_progress("collect") as display:
        directory = stack.enter_context(replacing_directory(paths.collection))
        training: Path | None = None
        if isinstance(paths.collection, Path):
            training = paths.collection.with_name(f"{paths.collection.name}.training")
            training.mkdir(exist_ok=True)
        state = None if training is None else training / f"{name}.pt"
        cpus = config.ray.train_threads or cpus_per_worker(node_resources(), 1, use_gpu)
        task = _train.options(num_cpus=cpus, num_gpus=int(use_gpu))
        for attempt in range(_ATTEMPTS):
            try:
                entries = _received(task.remote(config, judge, directory, cpus, state), config, display)
                break
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, RPGError):
                    raise error.cause from error
                raise
            except ray.exceptions.RayError:
                # The process or its node is gone, and another may go on.
                if attempt == _ATTEMPTS - 1:
                    raise
        Collection(directory, {FAMILY: config.tasks}, entries).save()
    if training is not None:
        shutil.rmtree(training)


def _received(refs: Any, config: Config, display: ProgressDisplay) -> list[Entry]:
    """The entries of a task's networks, as they come."""
    wanted = config.collect.checkpoints_per_task
    entries: list[Entry] = []
    display.update(0, wanted)
    for ref in refs:
        got = ray.get(ref)
        if isinstance(got, str):
            display.update(len(entries), wanted, got)
        else:
            entries.append(Entry(**got))
            metric, value = next(iter(entries[-1].metrics.items()))
            display.update(len(entries), wanted, f"{metric.replace('_', ' ')} {value:.3g}")
    return entries


@ray.remote(num_returns="streaming", max_retries=0)
def _train(
    config: Config, settings: JudgeSettings, directory: AnyPath, threads: int, state: Path | None
) -> Iterator[str | dict[str, Any]]:
    """Yields how far training is, and the entry of each network, whose file is written."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if settings.use_gpu else "cpu")
    judge = FamilyJudge(settings.tasks, settings.images, device, settings.evaluate.time_limit)
    name, number = settings.tasks, 0
    with tempfile.TemporaryDirectory() as scratch, calling(name, "checkpoints"):
        # Behind a URI there is no file to go on from, and another attempt begins anew.
        state = state or Path(scratch) / "state.pt"
        for got in judge.family.checkpoints(config.collect, config.seed, state):
            if isinstance(got, str):
                yield got
                continue
            path = directory / f"checkpoint_{number:04d}.safetensors"
            with replacing_file(path) as temporary:
                write_checkpoint(temporary, got, {"format": "pt"})
                digest = sha256(temporary)
            [measured] = judge.measure([Candidate(path.name, got, None)], "validation")
            if measured.failure is not None:
                raise RPGError(measured.failure)
            metrics = {f"validation_{metric}": value for metric, value in measured.metrics.items()}
            yield asdict(Entry(path.name, digest, None, metrics))
            number += 1
    if number < 2:
        raise RPGError(f"{name}: checkpoints: expected at least 2 networks, got {number}")
    if settings.use_gpu:
        # The process stays for a while, and the next stage needs the GPU's memory.
        torch.cuda.empty_cache()
