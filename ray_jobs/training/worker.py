"""One worker of Ray Train: resumes, trains, reports checkpoints and metrics."""

import functools
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import ray.train.torch
import torch

from ray_jobs.loading import load_generator, open_shards
from ray_jobs.refining_tasks import RefiningTasks
from ray_jobs.training.checkpoints import WorkerCheckpoints, history_row
from ray_jobs.training.tracking import log_everywhere, trackers
from ray_jobs.validation import ValidationTasks
from rpg.collection.retokenised import AnyShards, Retokenised
from rpg.config import Config
from rpg.errors import RPGError
from rpg.storage.locations import AnyPath
from rpg.training.progress import TrainingProgress

if TYPE_CHECKING:
    from rpg.training.trainer import Trainer


@dataclass(frozen=True)
class WorkerConfig:
    """What every worker is told; `ray_jobs.training.fitting.fit_generator` explains the fields."""

    config: Config
    shards: AnyPath
    storage: AnyPath
    name: str
    mailbox: Any
    token_size: int | None
    tasks: ValidationTasks | None
    may_be_stopped: bool
    """Whether to ask the mailbox, whenever something is logged, if training is to end early."""
    refining: RefiningTasks | None = None
    """By what a generator is refined; None: a new one is fitted."""


class _StopRequestedError(Exception):
    """All workers raise it at the same step."""


def train_worker(arguments: dict[str, WorkerConfig]) -> None:
    """Train as one of Ray Train's workers, from the last complete checkpoint on."""
    worker = arguments["worker"]
    if ray.get(worker.mailbox.refusal.remote()):
        return
    try:
        with suppress(_StopRequestedError):
            _train(worker)
    except RPGError as error:
        # Ray Train starts workers that failed again, which would meet the same input. The mailbox makes them
        # end at once, and the driver tells the user.
        ray.get(worker.mailbox.refuse.remote(str(error)))
        if ray.train.get_context().get_world_size() > 1:
            # Another worker may be waiting for this one; only a failure ends it.
            raise


def _train(worker: WorkerConfig) -> None:
    config = worker.config
    context: Any = ray.get_runtime_context()
    reserved = context.get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(config.ray.train_threads or max(1, min(int(reserved), os.cpu_count() or 1)))
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    trainer, run = _fitting(worker, device) if worker.refining is None else _refining(worker, device)
    checkpoints = WorkerCheckpoints(
        trainer,
        worker.storage,
        trainer.config.save_every,
        worker.mailbox,
        worker.tasks.higher_is_better if worker.tasks else True,
    )
    history, is_first = checkpoints.history, trainer.workers.rank == 0
    places = (config.tracking, config.name, worker.name, worker.storage, Path.cwd(), trainer.step)
    tracking = trackers(*places) if is_first else []

    def on_log(progress: TrainingProgress) -> None:
        if is_first:
            row = history_row(progress)
            history.append(row)
            log_everywhere(tracking, row)
            worker.mailbox.report.remote(progress)
        if worker.may_be_stopped:
            stop = ray.get(worker.mailbox.is_stop_requested.remote()) if is_first else False
            if trainer.workers.from_first(float(stop)):
                raise _StopRequestedError

    def on_save(trainer: "Trainer", progress: TrainingProgress) -> None:
        checkpoints.save(progress)
        for tracker in tracking:
            tracker.save()

    validate = worker.tasks.validate if worker.tasks else None
    seconds = history[-1]["seconds"] if history else 0.0
    run(on_log, on_save, validate, seconds)
    for tracker in tracking:
        tracker.close()


def _fitting(worker: WorkerConfig, device: torch.device) -> "tuple[Trainer, Callable[..., None]]":
    """A trainer that fits a new generator to the shards, and the loop that it is for."""
    # Importing the training loop takes a while, and the driver and Ray's controller import this module too.
    from rpg.training.fit import fit, new_trainer

    config = worker.config
    shards = _open(worker)
    trainer = new_trainer(shards, config.generator, config.train, config.seed, device)
    return trainer, functools.partial(fit, trainer, shards, config.seed)


def _refining(worker: WorkerConfig, device: torch.device) -> "tuple[Trainer, Callable[..., None]]":
    """A trainer that refines the fitted generator, and the loop that it is for."""
    from rpg.training.refining import new_refiner, refine

    config, refining = worker.config, worker.refining
    assert refining is not None
    loss = refining.loss(device)
    fitted = load_generator(refining.fitted, config.ray)
    trainer = new_refiner(fitted, loss, config.refine, config.generator.sampling, config.seed, device)
    return trainer, functools.partial(refine, trainer, refining.tasks, loss, config.seed)


def _open(worker: WorkerConfig) -> AnyShards:
    shards = open_shards(worker.shards, worker.config.ray)
    return shards if worker.token_size is None else Retokenised(shards, worker.token_size)
