"""Stage `train`: Ray Train fits the generator to the shards.

    python -m ray_jobs.train CONFIG [key=value …]

The workers report a checkpoint every `train.save_every` steps; workers that die are replaced and go on from
the last one, and so does a job that was stopped and started again with the same config.
"""

import sys
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.resources import training_need
from ray_jobs.run_paths import RunPaths
from ray_jobs.shard import SHARD
from ray_jobs.stage import Stage, fingerprint, stage_main
from ray_jobs.training.checkpoints import opened
from ray_jobs.training.fitting import check_fit, fit_generator
from ray_jobs.training.mailbox import Board
from ray_jobs.training.tracking import TENSORBOARD_DIRECTORY
from ray_jobs.training.worker import GENERATOR_DIRECTORY, HISTORY_FILE
from rpg.collection.manifest import read_manifest
from rpg.commands.progress import ProgressDisplay, stage_progress
from rpg.config import ConditionKind, Config
from rpg.errors import RPGError
from rpg.generator.saving import WEIGHTS_FILE
from rpg.storage.directories import remove_directory, replacing_directory
from rpg.storage.files import copy_file
from rpg.storage.locations import AnyPath
from rpg.text_encoder import ENCODER_DIRECTORY, check_encoder, copy_encoder
from rpg.training.progress import TrainingProgress


def run(config: Config) -> None:
    """Fit the generator to the shards."""
    paths = RunPaths.of(config)
    encoder = None
    digest = read_manifest(paths.shards).encoder
    if digest and config.generator.condition.kind == ConditionKind.vector:
        encoder = paths.collection / ENCODER_DIRECTORY
        # Before the hours that training may take.
        check_encoder(encoder, digest)
    # The name finds the checkpoints of an interrupted run of the same inputs, and of no other.
    name = fingerprint(TRAIN, config)[:16]
    # Both stay on the driver's node: the job cannot outlive that one anyway.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    checkpoint = _watched(_fit.options(scheduling_strategy=here).remote(config, name, board), board)
    with replacing_directory(paths.generator) as target:
        if encoder is not None:
            copy_encoder(encoder, target / ENCODER_DIRECTORY)
        copy_generator(checkpoint, paths.train, target)
    for other in paths.train.iterdir():
        # Checkpoints of other configs could only be resumed from by going back to them.
        if other.name not in (name, TENSORBOARD_DIRECTORY):
            remove_directory(other)


def copy_generator(checkpoint: ray.train.Checkpoint, storage: AnyPath, target: AnyPath) -> None:
    """Bring the generator that a run in `storage` ended with, and its history, into a directory."""
    with opened(checkpoint, storage) as directory:
        copy_file(directory / HISTORY_FILE, target / HISTORY_FILE)
        # The weights last: they make a generator of a directory that cannot be renamed into place.
        files = (directory / GENERATOR_DIRECTORY).iterdir()
        for file in sorted(files, key=lambda file: file.name == WEIGHTS_FILE):
            copy_file(file, target / file.name)


@ray.remote(num_cpus=0)
def _fit(config: Config, name: str, board: Any) -> Any:
    """Run Ray Train; returns the last checkpoint.

    A task of its own: in the driver Ray Train would take over Ctrl-C, and end it with status 1.
    """
    paths = RunPaths.of(config)
    return fit_generator(config, paths.shards, paths.train, name, board).checkpoint


def _watched(fitting: Any, board: Any) -> ray.train.Checkpoint:
    """Wait for `_fit` while showing progress."""
    with stage_progress("train") as progress:
        done: list[Any] = []
        while not done:
            done, _ = ray.wait([fitting], timeout=0.5)
            _show(progress, ray.get(board.latest.remote()))
    if (refusal := ray.get(board.refusal.remote())) is not None:
        raise RPGError(refusal)
    try:
        checkpoint: ray.train.Checkpoint = ray.get(fitting)
        return checkpoint
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RPGError):
            raise error.cause from error
        reason = str(error.cause or error).strip().splitlines()[-1]
        raise RPGError(f"train: failed for good: {reason}") from error


def _show(progress: ProgressDisplay, latest: TrainingProgress | None) -> None:
    if latest:
        note = f"loss {latest.loss:.4f}  {latest.tokens_per_second:,.0f} tokens/s"
        if latest.validation_accuracy is not None:
            note += f"  validation accuracy {latest.validation_accuracy:.3f}"
        progress.update(latest.step, latest.steps, note)


TRAIN = Stage(
    name="train",
    run=run,
    sections=(
        "seed",
        "generator.recurrent",
        "generator.denoiser",
        "generator.condition",
        "generator.diffusion",
        "train",
    ),
    after=SHARD,
    # The encoder is the collection's, which the stages before depend on. `generator.sampling` is left out,
    # though validation samples with it: no generator is trained anew to be sampled otherwise.
    ignored=(
        "train.log_every",
        "train.save_every",
        "train.keep",
        "train.sharding",
        "generator.condition.encoder",
    ),
    need=training_need,
    check=check_fit,
    outputs=lambda paths: [paths.generator / WEIGHTS_FILE],
    # It holds the seconds of each step: no two trainings leave the same.
    distinguishing=lambda paths: paths.generator / HISTORY_FILE,
)

if __name__ == "__main__":
    sys.exit(stage_main("train"))
