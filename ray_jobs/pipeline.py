"""The whole flow, from collect to evaluate. Stages whose inputs have not changed are kept.

python -m ray_jobs.pipeline CONFIG [key=value …]
"""

import sys
import time

from ray_jobs.evaluate import EVALUATE
from ray_jobs.run_paths import RunPaths
from ray_jobs.stage import is_done, job_main, require_resources_of, run_stage, with_stages_before
from rpg.commands.progress import console
from rpg.config import Config


def run(config: Config) -> None:
    """Run every stage of the flow that is not done yet."""
    began = time.perf_counter()
    stages = with_stages_before(EVALUATE, config)
    require_resources_of([stage for stage in stages if not is_done(stage, config)], config)
    for stage in stages:
        if is_done(stage, config):
            console.print(f"{stage.name}: unchanged, reused")
        else:
            run_stage(stage, config)
    made = stages[-1].outputs(RunPaths.of(config))[-1]
    console.print(f"done in {time.perf_counter() - began:.1f} s: {made}", soft_wrap=True)


def check(config: Config) -> None:
    """Refuse what any stage that is not done yet would refuse."""
    for stage in with_stages_before(EVALUATE, config):
        if not is_done(stage, config):
            stage.check(config)


if __name__ == "__main__":
    sys.exit(job_main("ray_jobs.pipeline", run.__doc__ or "", run, check, {}))
