"""Stage `refine`: Ray Train trains the fitted generator on, through what its networks are for.

    python -m ray_jobs.refine CONFIG [key=value …]

It is part of the flow where `refine.steps` is not 0, and resumes as stage `train` does.
"""

import sys

from ray_jobs.judging import check_judge, family_inputs, judge_inputs
from ray_jobs.refining_tasks import check_refining
from ray_jobs.resources import training_request
from ray_jobs.run_paths import RunPaths
from ray_jobs.stage import Stage, fingerprint, stage_main
from ray_jobs.train import TRAIN
from ray_jobs.training.checkpoints import HISTORY_FILE, copy_generator
from ray_jobs.training.driver import remove_other_runs, train_to_the_end
from ray_jobs.training.fitting import check_workers
from rpg.config import Config
from rpg.errors import RPGError
from rpg.generator.saving import WEIGHTS_FILE
from rpg.storage.directories import replacing_directory
from rpg.storage.locations import exists
from rpg.text_encoder import ENCODER_DIRECTORY, copy_encoder


def run(config: Config) -> None:
    """Train the fitted generator on, through the loss of its networks in their tasks."""
    paths = RunPaths.of(config)
    name = fingerprint(REFINE, config)[:16]
    checkpoint = train_to_the_end("refine", name, config)
    with replacing_directory(paths.generator) as target:
        if exists(paths.fitted / ENCODER_DIRECTORY):
            copy_encoder(paths.fitted / ENCODER_DIRECTORY, target / ENCODER_DIRECTORY)
        copy_generator(checkpoint, paths.refine, target)
    remove_other_runs(paths.refine, name)


def check(config: Config) -> None:
    """Refuse a config that no worker can refine with, and a family without a loss."""
    if not config.refine.steps:
        raise RPGError(
            "refine.steps: expected at least 1, got 0, which leaves generators as they were fitted"
        )
    check_workers(config, "refine")
    check_refining(config)
    if config.refine.validate_every:
        check_judge(config)


REFINE = Stage(
    name="refine",
    run=run,
    sections=("seed", "refine", "generator.sampling"),
    after=TRAIN,
    applies=lambda config: config.refine.steps > 0,
    ignored=("refine.log_every", "refine.save_every", "refine.keep"),
    further=lambda config: {
        **family_inputs(config),
        **(judge_inputs(config) if config.refine.validate_every else {}),
    },
    resources=training_request,
    check=check,
    outputs=lambda paths: [paths.generator / WEIGHTS_FILE],
    # The history holds the seconds of each step, so that no two runs leave the same.
    distinguishing=lambda paths: paths.generator / HISTORY_FILE,
)

if __name__ == "__main__":
    sys.exit(stage_main("refine"))
