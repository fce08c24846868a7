"""Stage `train`: Ray Train fits the generator to the shards.

    python -m ray_jobs.train CONFIG [key=value …]

The workers report a checkpoint every `train.save_every` steps. Workers that die are replaced and go on from
the last one, and so does a job that was stopped and is started again with the same config.
"""

import sys
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.judging import check_judge, judge_inputs
from ray_jobs.resources import training_request
from ray_jobs.run_paths import RunPaths
from ray_jobs.shard import SHARD
from ray_jobs.stage import Stage, fingerprint, stage_main
from ray_jobs.training.checkpoints import HISTORY_FILE, copy_generator
from ray_jobs.training.fitting import check_fit, fit_generator
from ray_jobs.training.mailbox import TrainingMailbox
from ray_jobs.training.tracking import TENSORBOARD_DIRECTORY
from rpg.collection.manifest import read_manifest
from rpg.commands.progress import ProgressDisplay, stage_progress
from rpg.config import ConditionKind, Config
from rpg.errors import RPGError
from rpg.generator.saving import WEIGHTS_FILE
from rpg.storage.directories import remove_directory, replacing_directory
from rpg.text_encoder import ENCODER_DIRECTORY, check_encoder, copy_encoder
from rpg.training.progress import TrainingProgress


def run(config: Config) -> None:
    """Fit the generator to the shards."""
    paths = RunPaths.of(config)
    encoder = None
    digest = read_manifest(paths.shards).encoder
    if digest and config.generator.condition.kind == ConditionKind.vector:
        encoder = paths.collection / ENCODER_DIRECTORY
        # A missing encoder is told now, since training may take hours.
        check_encoder(encoder, digest)
    # The name finds the checkpoints of an interrupted run of the same inputs, and of no other.
    name = fingerprint(TRAIN, config)[:16]
    # Both stay on the driver's node: without that node the job ends anyway.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = TrainingMailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    fitting = _fit.options(scheduling_strategy=here).remote(config, name, mailbox)
    checkpoint = _wait(fitting, mailbox)
    with replacing_directory(paths.generator) as target:
        if encoder is not None:
            copy_encoder(encoder, target / ENCODER_DIRECTORY)
        copy_generator(checkpoint, paths.train, target)
    for other in paths.train.iterdir():
        # Only a job with an earlier config could resume from other checkpoints.
        if other.name not in (name, TENSORBOARD_DIRECTORY):
            remove_directory(other)


def check(config: Config) -> None:
    """Refuse a config that no worker can train with, and what cannot validate its networks."""
    check_fit(config)
    if config.train.validate_every:
        check_judge(config)


@ray.remote(num_cpus=0)
def _fit(config: Config, name: str, mailbox: Any) -> Any:
    """Run Ray Train; returns the last checkpoint.

    This is a task of its own, because in the driver Ray Train would take over Ctrl-C and end the process with
    status 1.
    """
    paths = RunPaths.of(config)
    return fit_generator(config, paths.shards, paths.train, name, mailbox).checkpoint


def _wait(fitting: Any, mailbox: Any) -> ray.train.Checkpoint:
    """Wait for the task `_fit` while showing progress; returns its checkpoint."""
    with stage_progress("train") as display:
        done: list[Any] = []
        while not done:
            done, _ = ray.wait([fitting], timeout=0.5)
            _show(display, ray.get(mailbox.progress.remote()))
    if (refusal := ray.get(mailbox.refusal.remote())) is not None:
        raise RPGError(refusal)
    try:
        checkpoint: ray.train.Checkpoint = ray.get(fitting)
        return checkpoint
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RPGError):
            raise error.cause from error
        reason = str(error.cause or error).strip().splitlines()[-1]
        raise RPGError(f"train: failed for good: {reason}") from error


def _show(display: ProgressDisplay, progress: TrainingProgress | None) -> None:
    if progress:
        note = f"loss {progress.loss:.4f}  {progress.tokens_per_second:,.0f} tokens/s"
        if progress.validation_score is not None:
            note += f"  validation {progress.validation_note} {progress.validation_score:.3g}"
        elif progress.validation_note:
            note += f"  validation failed: {progress.validation_note:.200}"
        display.update(progress.step, progress.steps, note)


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
    # though validation samples with it: otherwise a generator would have to be trained anew before it could
    # be sampled in another way.
    ignored=(
        "train.log_every",
        "train.save_every",
        "train.keep",
        "train.sharding",
        "generator.condition.encoder",
    ),
    # Validation chooses the generator.
    further=lambda config: judge_inputs(config) if config.train.validate_every else {},
    resources=training_request,
    check=check,
    outputs=lambda paths: [paths.generator / WEIGHTS_FILE],
    # The history holds the seconds of each step, so that no two trainings leave the same.
    distinguishing=lambda paths: paths.generator / HISTORY_FILE,
)

if __name__ == "__main__":
    sys.exit(stage_main("train"))
