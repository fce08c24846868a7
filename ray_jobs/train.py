"""Stage `train`: Ray Train fits the generator to the shards.

    python -m ray_jobs.train CONFIG [key=value …]

The workers report a checkpoint every `train.save_every` steps. Workers that die are replaced and go on from
the last one, and so does a job that was stopped and is started again with the same config.
"""

import sys

from ray_jobs.judging import check_judge, judge_inputs
from ray_jobs.resources import training_request
from ray_jobs.run_paths import RunPaths
from ray_jobs.shard import SHARD
from ray_jobs.stage import Stage, fingerprint, stage_main
from ray_jobs.training.checkpoints import HISTORY_FILE, copy_generator
from ray_jobs.training.driver import remove_other_runs, train_to_the_end
from ray_jobs.training.fitting import check_workers
from rpg.collection.manifest import read_manifest
from rpg.config import ConditionKind, Config
from rpg.generator.saving import WEIGHTS_FILE
from rpg.storage.directories import replacing_directory
from rpg.text_encoder import ENCODER_DIRECTORY, check_encoder, copy_encoder


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
    checkpoint = train_to_the_end("train", name, config)
    with replacing_directory(paths.fitted) as target:
        if encoder is not None:
            copy_encoder(encoder, target / ENCODER_DIRECTORY)
        copy_generator(checkpoint, paths.train, target)
    remove_other_runs(paths.train, name)


def check(config: Config) -> None:
    """Refuse a config that no worker can train with, and what cannot validate its networks."""
    check_workers(config, "train")
    if config.train.validate_every:
        check_judge(config)


TRAIN = Stage(
    name="train",
    run=run,
    sections=(
        "seed",
        "generator.recurrent",
        "generator.denoiser",
        "generator.condition",
        "generator.diffusion",
        "generator.dtype",
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
    outputs=lambda paths: [paths.fitted / WEIGHTS_FILE],
    # The history holds the seconds of each step, so that no two trainings leave the same.
    distinguishing=lambda paths: paths.fitted / HISTORY_FILE,
)

if __name__ == "__main__":
    sys.exit(stage_main("train"))
