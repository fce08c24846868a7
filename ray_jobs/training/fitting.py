"""Ray Train fits one generator: how many workers there are, what they reserve, where their checkpoints go."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import ray.train
import ray.train.torch

from ray_jobs.run_paths import RunPaths
from ray_jobs.training.atomic_files import whole_files
from ray_jobs.training.own_cluster import own_cluster_named
from ray_jobs.training.tracking import refuse_missing_packages
from ray_jobs.training.worker import Settings, train_worker
from ray_jobs.validation import ValidationTasks
from rpg.collection.collection import Collection
from rpg.config import Config, RayConfig
from rpg.errors import RPGError
from rpg.storage.locations import AnyPath
from rpg.training.expandable_segments import allocator_settings

RESIZE_SECONDS = 60.0
"""How often an elastic run looks whether it may grow."""
_RETRIES = 8
_SNAPSHOT = "checkpoint_manager_snapshot.json"


def fit_generator(
    config: Config,
    shards: AnyPath,
    storage: AnyPath,
    name: str,
    board: Any,
    token_size: int | None = None,
    on_report: Callable[[dict[str, Any]], None] | None = None,
) -> ray.train.Result:
    """Fit the generator that `config` describes, or go on where a run of this name in `storage` stopped.

    Args:
        config: of the run.
        shards: directory of the shards.
        storage: directory of training runs.
        name: of this run; it stands for all that determines its result.
        board: a `Board`.
        token_size: train on tokens of this size, cut anew from the shards' own; None: as they are.
        on_report: makes the run one that `Board.stop` ends early; called with the metrics of every saved or
            validated step (`Progress` without what is None), in Ray Train's controller: a process of its own.

    Returns:
        Ray Train's result, whose checkpoint holds the best generator (`copy_generator`).

    Raises:
        RPGError: for input that no worker can train on.
        ray.train.TrainingFailedError: if workers keep failing.
    """
    check_fit(config)
    tasks = None
    if config.train.validate_every:
        tasks = ValidationTasks.of(config, Collection.load(RunPaths.of(config).collection))
    # Ray Train takes in one report each time it looks, every two seconds unless told otherwise.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if config.tracking.mlflow and "://" not in config.tracking.mlflow:
        # A directory as seen from here: Ray's workers run elsewhere.
        local = str(Path(config.tracking.mlflow).expanduser().absolute())
        config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, mlflow=local))
    filesystem, root = storage_filesystem(storage)
    _remove_unfinished(filesystem, f"{root}/{name}")
    callbacks = [_Reports(on_report)] if on_report else []
    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={
            "settings": Settings(
                config, shards, storage, name, board, token_size, tasks, on_report is not None
            )
        },
        scaling_config=_scaling(config.ray),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Ray Train V1
            name=name,
            storage_path=root,
            storage_filesystem=filesystem,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.train.keep),
            failure_config=ray.train.FailureConfig(max_failures=_RETRIES),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
            callbacks=callbacks,  # type: ignore[arg-type]
            # Before Ray Train chooses the GPU: PyTorch reads it then.
            worker_runtime_env={"env_vars": allocator_settings()} if config.ray.use_gpu else None,
        ),
    )
    with own_cluster_named():
        result = trainer.fit()
    if (refusal := ray.get(board.refusal.remote())) is not None:
        raise RPGError(refusal)
    if result.checkpoint is None:
        raise RPGError("train: ended without a checkpoint")
    _remove_unfinished(filesystem, f"{root}/{name}")
    return result


def check_fit(config: Config) -> None:
    """Refuse a config that no worker can train with, before there are any.

    Raises:
        RPGError: naming the key.
    """
    if config.ray.train_workers > config.train.checkpoints_per_step:
        raise RPGError(
            f"train.checkpoints_per_step: expected at least one for each of {config.ray.train_workers} "
            f"training workers, got {config.train.checkpoints_per_step}"
        )
    refuse_missing_packages(config.tracking, config.train)


def cpus_per_worker(nodes: list[dict[str, float]], workers: int, use_gpu: bool) -> int:
    """The most CPUs that each of `workers` can have on `nodes` (their resources); at least 1."""
    for cpus in range(int(max((node.get("CPU", 0) for node in nodes), default=1)), 1, -1):
        room = (min(node.get("CPU", 0) // cpus, node.get("GPU", 0) if use_gpu else workers) for node in nodes)
        if sum(room) >= workers:
            return cpus
    return 1


def _scaling(config: RayConfig) -> ray.train.ScalingConfig:
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    fewest = config.min_train_workers or config.train_workers
    cpus = config.train_threads or cpus_per_worker(nodes, config.train_workers, config.use_gpu)
    elastic: dict[str, Any] = {"num_workers": config.train_workers}
    if fewest < config.train_workers:
        elastic = {
            "num_workers": (fewest, config.train_workers),
            "elastic_resize_monitor_interval_s": RESIZE_SECONDS,
        }
    # More threads than there are CPUs on any node are no reason to wait for such a node for ever.
    most = max((int(node.get("CPU", 0)) for node in nodes), default=1)
    reserved = {"CPU": max(1, min(cpus, most)), **({"GPU": 1} if config.use_gpu else {})}
    return ray.train.ScalingConfig(use_gpu=config.use_gpu, resources_per_worker=reserved, **elastic)


class _Reports(ray.train.UserCallback):
    def __init__(self, on_report: Callable[[dict[str, Any]], None]) -> None:
        self._on_report = on_report

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        self._on_report(metrics[0])


def storage_filesystem(storage: AnyPath) -> tuple[Any, str]:
    """The file system of a path, whose files appear as a whole, and the path on it."""
    if isinstance(storage, Path):
        return whole_files(), str(storage)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.fs)), storage.path


def _remove_unfinished(filesystem: Any, run: str) -> None:
    """Remove what Ray does not list as a complete checkpoint: uploads that were interrupted."""
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(run, allow_not_found=True))
    complete: set[str] = set()
    for info in found:
        if info.base_name == _SNAPSHOT:
            with filesystem.open_input_stream(info.path) as file:
                state = json.loads(file.read())
            complete = {result["checkpoint_dir_name"] for result in state["checkpoint_results"]}
    for info in found:
        if info.base_name.startswith("checkpoint_") and info.base_name not in complete | {_SNAPSHOT}:
            filesystem.delete_dir(info.path)
