"""Job `tune`: Ray Tune searches token size, model size and whatever else `tune.space` names.

    python -m ray_jobs.tune CONFIG [key=value …]

Every trial fits a generator with Ray Train to the same shards, cut anew to the trial's token size as they are
read, and refines it if the config does. All trials take the same compute. ASHA stops the trials whose
generated networks are worst on the validation tasks. A search that was stopped goes on when it is started
again with the same config.
"""

import sys
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from ray_jobs.judging import check_judge, judge_inputs
from ray_jobs.loading import load_collection, open_shards
from ray_jobs.refine import REFINE
from ray_jobs.refining_tasks import RefiningTasks
from ray_jobs.run_paths import RunPaths
from ray_jobs.search.results import (
    BEST_FILE,
    TABLE_FILE,
    TrialResult,
    describe,
    failures,
    ranked,
    results_table,
    write_results,
)
from ray_jobs.search.space import draw_points, search_space
from ray_jobs.search.trial import Trial, TrialMaker, best_config
from ray_jobs.search.tuner import SearchMailbox, run_directory, search_task
from ray_jobs.shard import SHARD
from ray_jobs.stage import Stage, fingerprint, is_done, job_main, run_stage, with_stages_before
from ray_jobs.validation import ValidationTasks
from rpg.commands.progress import ProgressDisplay, console, stage_progress
from rpg.config import Config, with_values
from rpg.errors import RPGError
from rpg.storage.directories import remove_directory
from rpg.tasks.task_loss import TaskLoss, TrainingTasks

_TABLE_WIDTH = 120
_THINNINGS = 2
"""How often ASHA thins the trials out before the end of the budget."""


def run(config: Config) -> None:
    """Search, and write the ranked table, the figure and the best config."""
    paths, space = RunPaths.of(config), search_space(config)
    # Every trial validates, so a collection without validation tasks is refused here.
    tasks = ValidationTasks.of(config, "train", load_collection(paths.collection))
    # Trials that share the machine take a thread each unless told otherwise.
    threads = config.ray.train_threads or 1
    # Trials run in other directories, where relative paths would lead elsewhere.
    places = {
        "output": str(paths.root),
        "collect.directory": str(paths.collection),
        "collect.images": paths.images,
        "tasks": paths.tasks,
    }
    searched = with_values(config, {"ray.train_threads": threads, **places}, "ray")
    rounds = config.tune.reduction**_THINNINGS
    shards = open_shards(paths.shards, config.ray)
    points = draw_points(config, space, config.tune.trials)
    name = fingerprint(TUNE, config)[:16]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    with stage_progress("tune") as display:
        display.update(0, len(points), "counting the arithmetic of a step")
        maker = TrialMaker(searched, shards, rounds, _refining(searched))
        trials = [maker.make(str(i), point) for i, point in enumerate(points)]
        mailbox = SearchMailbox.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        task = search_task.options(scheduling_strategy=here)
        searching = task.remote(searched, trials, name, rounds, mailbox, tasks.higher_is_better)
        results = ranked(_wait(searching, mailbox, display, trials), tasks.higher_is_better)
    if results[0].score is None:
        raise RPGError(f"tune: all trials failed, one of them with: {results[0].failure}")
    best = best_config(results[0].trial, config)
    write_results(paths.root / "tune", results, list(space), best, tasks.higher_is_better)
    Console(width=_TABLE_WIDTH).print(results_table(results, list(space)))
    for line in failures(results):
        console.print(f"tune: {line}", soft_wrap=True, markup=False)
    remove_directory(run_directory(config, name) / "train")
    console.print(f"best config: {paths.root / 'tune' / BEST_FILE}", soft_wrap=True)
    # The shards of the best config are cut now, so that it can be trained as it is.
    run_stage(SHARD, best)


def _refining(config: Config) -> tuple[TrainingTasks, TaskLoss] | None:
    """By what trials are refined, on the CPU; None without refining."""
    if not config.refine.steps:
        return None
    refining = RefiningTasks.of(config, RunPaths.of(config).fitted)
    return refining.tasks, refining.loss(torch.device("cpu"))


def _wait(searching: Any, mailbox: Any, display: ProgressDisplay, trials: list[Trial]) -> list[TrialResult]:
    """Wait for the task `search_task` while showing how far it is."""
    done: list[Any] = []
    while not done:
        done, _ = ray.wait([searching], timeout=0.5)
        status = ray.get(mailbox.status.remote())
        note = f"{status.running} running"
        if status.best is not None:
            index, score = status.best
            note += f", best so far {score:.3g}: {describe(trials[index].point)}"
        display.update(status.ended, len(trials), note)
    results: list[TrialResult] = ray.get(searching)
    return results


TUNE = Stage(
    name="tune",
    run=run,
    sections=("seed", "generator", "train", "refine", "tune"),
    after=SHARD,
    ignored=("tune.concurrent",),
    further=judge_inputs,
    outputs=lambda paths: [paths.root / "tune" / TABLE_FILE, paths.root / "tune" / BEST_FILE],
)


def search(config: Config) -> None:
    """Search token size, model size and whatever else `tune.space` names."""
    for stage in with_stages_before(TUNE, config):
        if is_done(stage, config):
            console.print(f"{stage.name}: unchanged, reused")
        else:
            run_stage(stage, config)


def check(config: Config) -> None:
    """Refuse a search space that cannot be searched, and what the stages before the search would refuse."""
    search_space(config)
    check_judge(config)
    if config.refine.steps:
        REFINE.check(config)
    for stage in with_stages_before(TUNE, config):
        if not is_done(stage, config):
            stage.check(config)


if __name__ == "__main__":
    sys.exit(job_main("ray_jobs.tune", search.__doc__ or "", search, check, {}))
