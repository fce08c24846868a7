"""Ray Train fits one generator: how many workers there are, what they reserve, where their checkpoints go."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

from ray_jobs.loading import load_collection
from ray_jobs.refining_tasks import RefiningTasks
from ray_jobs.resources import cpus_per_worker, node_resources, worker_resources
from ray_jobs.run_paths import RunPaths
from ray_jobs.training.atomic_files import storage_filesystem
from ray_jobs.training.checkpoints import remove_interrupted_uploads
from ray_jobs.training.tracking import refuse_missing_packages
from ray_jobs.training.worker import WorkerConfig, train_worker
from ray_jobs.validation import ValidationTasks
from rpg.config import Config, OptimiserConfig, RayConfig
from rpg.errors import RPGError
from rpg.storage.locations import AnyPath

RESIZE_SECONDS = 60.0
"""How often an elastic run looks whether it may grow."""
_RETRIES = 8
_ADDRESS = "RAY_ADDRESS"
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def fit_generator(
    config: Config,
    shards: AnyPath,
    storage: AnyPath,
    name: str,
    mailbox: Any,
    token_size: int | None = None,
    on_report: Callable[[dict[str, Any]], None] | None = None,
    fitted: AnyPath | None = None,
) -> ray.train.Result:
    """Fit the generator that `config` describes, or go on where a run of this name in `storage` stopped.

    Args:
        config: of the run.
        shards: directory of the shards.
        storage: directory of training runs.
        name: of this run; it stands for all that determines its result.
        mailbox: handle of a `TrainingMailbox`.
        token_size: train on tokens of this size, cut anew from the shards' own; None: as they are.
        on_report: called with the metrics of every saved or validated step (`history_row`) in the process of
            Ray Train's controller. A run with it can be ended early (`TrainingMailbox.request_stop`).
        fitted: directory of a generator that is refined, by the settings of `config.refine`; None: a new one
            is fitted.

    Returns:
        Ray Train's result, whose checkpoint holds the best generator (`copy_generator`).

    Raises:
        RPGError: for input that no worker can train on.
        ray.train.TrainingFailedError: if workers keep failing.
    """
    stage = "train" if fitted is None else "refine"
    settings: OptimiserConfig = getattr(config, stage)
    check_workers(config, stage)
    tasks = None
    if settings.validate_every:
        tasks = ValidationTasks.of(config, stage, load_collection(RunPaths.of(config).collection))
    # Ray Train takes in one report each time it looks, every two seconds unless told otherwise.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if config.tracking.mlflow and "://" not in config.tracking.mlflow:
        # Ray's workers run in other directories, where a relative path would lead elsewhere.
        local = str(Path(config.tracking.mlflow).expanduser().absolute())
        config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, mlflow=local))
    filesystem, root = storage_filesystem(storage)
    remove_interrupted_uploads(filesystem, f"{root}/{name}")
    refining = None if fitted is None else RefiningTasks.of(config, fitted)
    worker = WorkerConfig(
        config, shards, storage, name, mailbox, token_size, tasks, on_report is not None, refining
    )
    callbacks = [_ReportCallback(on_report)] if on_report else []
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={"worker": worker},
        scaling_config=_scaling(config.ray),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train V1
            name=name,
            storage_path=root,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=settings.keep),
            failure_config=ray.train.FailureConfig(max_failures=_RETRIES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            callbacks=callbacks,  # type: ignore[arg-type]
            # Workers need these from their start: PyTorch reads them when Ray Train chooses the GPU.
            worker_runtime_env={"env_vars": allocator_settings()} if config.ray.use_gpu else None,
        ),
    )
    with ray_train_finds_this_cluster():
        result = trainer.fit()
    if (refusal := ray.get(mailbox.refusal.remote())) is not None:
        raise RPGError(refusal)
    if result.checkpoint is None:
        raise RPGError("train: ended without a checkpoint")
    remove_interrupted_uploads(filesystem, f"{root}/{name}")
    return result


def check_workers(config: Config, stage: str) -> None:
    """Refuse settings of the stage `train` or `refine` that no worker can train with, before there are any.

    Raises:
        RPGError: naming the key.
    """
    rows = {"train": "checkpoints_per_step", "refine": "tasks_per_step"}[stage]
    settings = getattr(config, stage)
    if config.ray.train_workers > (there := getattr(settings, rows)):
        raise RPGError(
            f"{stage}.{rows}: expected at least one for each of {config.ray.train_workers} training workers, "
            f"got {there}"
        )
    refuse_missing_packages(config.tracking, stage, settings)


@contextmanager
def ray_train_finds_this_cluster() -> Iterator[None]:
    """Have runs of Ray Train that begin in the block find the cluster that this process is connected to.

    Ray Train has a helper process that asks whether a run's controller is alive, and that takes the run's
    workers away if it is not. The helper looks for the cluster at RAY_ADDRESS, and without that takes the
    one that somebody last started on the node (Ray 2.60). If that cluster was killed, every run ends twelve
    seconds late; if it lives, it does not know the controller.
    """
    before = os.environ.get(_ADDRESS)
    os.environ[_ADDRESS] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add(_ADDRESS)
    try:
        yield
    finally:
        del os.environ[_ADDRESS]
        if before is not None:
            os.environ[_ADDRESS] = before


def allocator_settings() -> dict[str, str]:
    """Environment for processes that train on a GPU: PyTorch's blocks of its memory grow.

    Otherwise PyTorch leaves small blocks behind when it needs larger ones. A step of the published generator
    at ResNet-18's size then takes 35.8 GB of the card, not 30.4 (benchmarks/training_speed.md). Settings of
    the allocator that the user has made are left alone. A process reads them when it first uses its GPU.
    """
    if any(variable in os.environ for variable in _ALLOCATOR_VARIABLES):
        return {}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def _scaling(config: RayConfig) -> ray.train.ScalingConfig:
    nodes = node_resources()
    fewest = config.min_train_workers or config.train_workers
    cpus = config.train_threads or cpus_per_worker(nodes, config.train_workers, config.use_gpu)
    elastic: dict[str, Any] = {"num_workers": config.train_workers}
    if fewest < config.train_workers:
        elastic = {
            "num_workers": (fewest, config.train_workers),
            "elastic_resize_monitor_interval_s": RESIZE_SECONDS,
        }
    reserved = worker_resources(nodes, cpus, config.use_gpu)
    return ray.train.ScalingConfig(use_gpu=config.use_gpu, resources_per_worker=reserved, **elastic)


class _ReportCallback(ray.train.UserCallback):
    """Calls a function with the first worker's metrics."""

    def __init__(self, on_report: Callable[[dict[str, Any]], None]) -> None:
        self._on_report = on_report

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._on_report(metrics[0])
