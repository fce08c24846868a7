"""The driver's side of training: it starts a run of Ray Train and shows how far it is."""

from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.run_paths import RunPaths
from ray_jobs.training.fitting import fit_generator
from ray_jobs.training.mailbox import TrainingMailbox
from ray_jobs.training.tracking import TENSORBOARD_DIRECTORY
from rpg.commands.progress import ProgressDisplay, stage_progress
from rpg.config import Config
from rpg.errors import RPGError
from rpg.storage.directories import remove_directory
from rpg.storage.locations import AnyPath
from rpg.training.progress import TrainingProgress


def train_to_the_end(stage: str, name: str, config: Config) -> ray.train.Checkpoint:
    """Run the training of the stage `train` or `refine`, or go on where a run of this name stopped.

    Returns:
        The checkpoint with the best generator (`copy_generator`).

    Raises:
        RPGError: if the workers refuse their input, or keep failing.
    """
    # Both stay on the driver's node: without that node the job ends anyway.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = TrainingMailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    training = _train.options(scheduling_strategy=here).remote(stage, name, config, mailbox)
    with stage_progress(stage) as display:
        done: list[Any] = []
        while not done:
            done, _ = ray.wait([training], timeout=0.5)
            _show(display, ray.get(mailbox.progress.remote()))
    if (refusal := ray.get(mailbox.refusal.remote())) is not None:
        raise RPGError(refusal)
    try:
        checkpoint: ray.train.Checkpoint = ray.get(training)
        return checkpoint
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RPGError):
            raise error.cause from error
        reason = str(error.cause or error).strip().splitlines()[-1]
        raise RPGError(f"{stage}: failed for good: {reason}") from error


def remove_other_runs(storage: AnyPath, name: str) -> None:
    """Remove the training runs in `storage` but the one of this name; what is tracked of them stays."""
    for other in storage.iterdir():
        # Only a job with an earlier config could resume from other checkpoints.
        if other.name not in (name, TENSORBOARD_DIRECTORY):
            remove_directory(other)


@ray.remote(num_cpus=0)
def _train(stage: str, name: str, config: Config, mailbox: Any) -> Any:
    """Run Ray Train; returns the last checkpoint.

    This is a task of its own, because in the driver Ray Train would take over Ctrl-C and end the process with
    status 1.
    """
    paths = RunPaths.of(config)
    storage, fitted = (paths.train, None) if stage == "train" else (paths.refine, paths.fitted)
    return fit_generator(config, paths.shards, storage, name, mailbox, fitted=fitted).checkpoint


def _show(display: ProgressDisplay, progress: TrainingProgress | None) -> None:
    if progress:
        note = f"loss {progress.loss:.4f}  {progress.tokens_per_second:,.0f} tokens/s"
        if progress.validation_score is not None:
            note += f"  validation {progress.validation_note} {progress.validation_score:.3g}"
        elif progress.validation_note:
            note += f"  validation failed: {progress.validation_note:.200}"
        display.update(progress.step, progress.steps, note)
