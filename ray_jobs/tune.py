"""Job `tune`: Ray Tune searches token size, model size and whatever else `tune.space` names.

    python -m ray_jobs.tune CONFIG [key=value …]

Every trial is a Ray Train run of the same compute over the same shards, cut anew to the trial's token size as
they are read. ASHA stops those whose generated networks are worst on the validation tasks. A search that was
stopped goes on when it is started again with the same config.
"""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# The job shows its own progress, and metrics go where training writes them.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")

# A trial is several processes, most of which wait: no reason for Ray to warn of their number.
os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")

import ray
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from ray_jobs.node_copies import open_shards
from ray_jobs.run_paths import RunPaths
from ray_jobs.search.results import (
    BEST_FILE,
    TABLE_FILE,
    TrialResult,
    describe,
    ranked,
    results_table,
    write_results,
)
from ray_jobs.search.space import draw_points, search_space
from ray_jobs.search.trial import Trial, best_config, make_trial
from ray_jobs.shard import SHARD
from ray_jobs.stage import Stage, fingerprint, is_done, job_main, run_stage, with_stages_before
from ray_jobs.training.fitting import fit_generator, storage_filesystem
from ray_jobs.training.mailbox import Board
from ray_jobs.validation import ValidationTasks
from rpg.collection.collection import Collection
from rpg.commands.progress import ProgressDisplay, console, stage_progress
from rpg.config import Config, with_values
from rpg.errors import RPGError
from rpg.storage.directories import remove_directory
from rpg.storage.files import read_json, write_json
from rpg.storage.locations import AnyPath, exists

_TRIAL, _ROUND, _ACCURACY = "trial", "round", "accuracy"
_EXPERIMENT = "search"
_TABLE_WIDTH = 120
_THINNINGS = 2
"""Times that ASHA thins the trials out before the end of the budget."""


def run(config: Config) -> None:
    """Search, and write the ranked table, the figure and the best config."""
    paths, space = RunPaths.of(config), search_space(config)
    # Every trial validates; find out here that it cannot be done.
    ValidationTasks.of(config, Collection.load(paths.collection))
    # Trials that share the machine take a thread each unless told otherwise.
    threads = config.ray.train_threads or 1
    # Trials run in directories of their own: what is relative would lead elsewhere.
    places = {
        "output": str(paths.root),
        "collect.directory": str(paths.collection),
        "collect.images": paths.images,
    }
    searched = with_values(config, {"ray.train_threads": threads, **places}, "ray")
    rounds = config.tune.reduction**_THINNINGS
    shards = open_shards(paths.shards, config.ray)
    points = draw_points(config, space, config.tune.trials)
    name = fingerprint(TUNE, config)[:16]
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    with stage_progress("tune") as progress:
        progress.update(0, len(points), "counting the arithmetic of a step")
        trials = [make_trial(str(i), searched, point, shards, rounds) for i, point in enumerate(points)]
        board = _SearchBoard.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        searching = _search.options(scheduling_strategy=here).remote(searched, trials, name, rounds, board)
        results = ranked(_watched(searching, board, progress, trials))
    if results[0].accuracy is None:
        raise RPGError(f"tune: all trials failed, one of them with: {results[0].failure}")
    best = best_config(results[0].trial, config)
    write_results(paths.root / "tune", results, list(space), best)
    Console(width=_TABLE_WIDTH).print(results_table(results, list(space)))
    remove_directory(paths.root / "tune" / name / "train")
    console.print(f"best config: {paths.root / 'tune' / BEST_FILE}", soft_wrap=True)
    # So that the best config can be trained as it is.
    run_stage(SHARD, best)


def _watched(searching: Any, board: Any, progress: ProgressDisplay, trials: list[Trial]) -> list[TrialResult]:
    """Wait for the search while showing how far it is."""
    done: list[Any] = []
    while not done:
        done, _ = ray.wait([searching], timeout=0.5)
        ended, running, leader = ray.get(board.standing.remote())
        note = f"{running} running"
        if leader is not None:
            index, accuracy = leader
            note += f", best so far {accuracy:.3f}: {describe(trials[index].point)}"
        progress.update(ended, len(trials), note)
    results: list[TrialResult] = ray.get(searching)
    return results


@ray.remote(num_cpus=0)
def _search(config: Config, trials: list[Trial], name: str, rounds: int, board: Any) -> list[TrialResult]:
    """Run Ray Tune; trials that a stopped search of this name has begun go on where they were.

    A task of its own, as Ray Train has: the driver is left with Ctrl-C and the progress line.
    """
    paths = RunPaths.of(config)
    filesystem, root = storage_filesystem(paths.root / "tune" / name)
    function = _trainable(trials, paths.shards, paths.root / "tune" / name / "train", rounds)
    # Its workers of Ray Train reserve what they need; Tune wants some resource to place it by.
    trainable = ray.tune.with_resources(function, {"memory": 1})
    # What Ray keeps of a search is a pickle, and is not read again: trials know themselves how far they came.
    remove_directory(paths.root / "tune" / name / _EXPERIMENT)
    tuner = ray.tune.Tuner(
        trainable,
        param_space={_TRIAL: ray.tune.grid_search(list(range(len(trials))))},
        tune_config=ray.tune.TuneConfig(
            metric=_ACCURACY,
            mode="max",
            scheduler=_EndingWell(
                time_attr=_ROUND,
                max_t=rounds,
                grace_period=1,
                reduction_factor=config.tune.reduction,
                stop_last_trials=False,
            ),
            max_concurrent_trials=_concurrent(config),
        ),
        run_config=ray.tune.RunConfig(
            name=_EXPERIMENT,
            storage_path=root,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_Watcher(board)],
        ),
    )
    grid = tuner.fit()
    return [_result(trials, grid[i], rounds) for i in range(len(grid))]


def _result(trials: list[Trial], result: ray.tune.Result, rounds: int) -> TrialResult:
    assert result.config is not None
    trial, metrics = trials[int(result.config[_TRIAL])], result.metrics or {}
    accuracy, failure = metrics.get(_ACCURACY), None
    if result.error:
        accuracy, failure = None, str(result.error).strip().splitlines()[-1]
    share = int(metrics.get(_ROUND, 0)) / rounds
    return TrialResult(trial, accuracy, share, float(metrics.get("seconds", 0.0)), failure)


def _trainable(
    trials: list[Trial], shards: AnyPath, storage: AnyPath, rounds: int
) -> Callable[[dict[str, Any]], None]:
    def trainable(parameters: dict[str, Any]) -> None:
        trial = trials[parameters[_TRIAL]]
        config, record = trial.config, storage / f"{trial.name}.json"
        every, forward = config.train.validate_every, TuneReportCallback()  # type: ignore[no-untyped-call]
        done: list[dict[str, Any]] = read_json(record, "a trial's rounds") if exists(record) else []
        for each in done:
            ray.tune.report(each)

        def on_report(metrics: dict[str, Any]) -> None:
            accuracy, step = metrics.get("validation_accuracy"), metrics["step"]
            # Training may go on from before the last round that was told.
            if accuracy is not None and step == every * (len(done) + 1):
                done.append({_ROUND: len(done) + 1, _ACCURACY: accuracy, "seconds": metrics["seconds"]})
                write_json(record, done)
                forward.after_report(None, [done[-1]], None)  # type: ignore[arg-type]

        if len(done) < rounds:
            board = Board.options(name=_board_name(parameters[_TRIAL])).remote()  # type: ignore[attr-defined]
            fit_generator(config, shards, storage, trial.name, board, config.shard.token_size, on_report)

    return trainable


def _concurrent(config: Config) -> int:
    """Trials that the cluster has room for at a time."""
    if config.tune.concurrent:
        return config.tune.concurrent
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = config.ray.train_workers
    if config.ray.use_gpu:
        return max(1, int(there.get("GPU", 0)) // workers)
    return max(1, int(there.get("CPU", 1)) // (workers * config.ray.train_threads))


class _EndingWell(ASHAScheduler):
    """ASHA that asks a trial to end where Ray Tune would kill it.

    Of a run of Ray Train whose controller is killed, the reserved CPUs are not given back.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Let the trial go on, to its own end."""
        if super().on_trial_result(tune_controller, trial, result) == self.STOP:
            with suppress(ValueError):  # It has ended already.
                ray.get_actor(_board_name(trial.config[_TRIAL])).stop.remote()
        return str(self.CONTINUE)


def _board_name(trial: int) -> str:
    return f"board of trial {trial}"


class _Watcher(ray.tune.Callback):
    """Tells the board how the trials stand."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        ended = sum(trial.status in (trial.TERMINATED, trial.ERROR) for trial in trials)
        running = sum(trial.status == trial.RUNNING for trial in trials)
        accuracies = [
            (trial.last_result[_ACCURACY], trial.config[_TRIAL])
            for trial in trials
            if _ACCURACY in (trial.last_result or {})
        ]
        best = max(accuracies, default=None)
        self._board.post.remote(ended, running, best and (best[1], best[0]))


@ray.remote(num_cpus=0)
class _SearchBoard:
    """Where the search writes how it stands, and the driver reads it."""

    def __init__(self) -> None:
        self._standing: tuple[int, int, tuple[int, float] | None] = (0, 0, None)

    def post(self, ended: int, running: int, leader: tuple[int, float] | None) -> None:
        self._standing = (ended, running, leader)

    def standing(self) -> tuple[int, int, tuple[int, float] | None]:
        return self._standing


TUNE = Stage(
    name="tune",
    run=run,
    sections=("seed", "generator", "train", "tune"),
    after=SHARD,
    ignored=("tune.concurrent",),
    outputs=lambda paths: [paths.root / "tune" / TABLE_FILE, paths.root / "tune" / BEST_FILE],
)


def search(config: Config) -> None:
    """Search token size, model size and whatever else `tune.space` names."""
    for stage in with_stages_before(TUNE):
        if is_done(stage, config):
            console.print(f"{stage.name}: unchanged, reused")
        else:
            run_stage(stage, config)


def check(config: Config) -> None:
    """Refuse a search space that cannot be searched, and what the stages before the search would refuse."""
    search_space(config)
    for stage in with_stages_before(TUNE):
        if not is_done(stage, config):
            stage.check(config)


if __name__ == "__main__":
    sys.exit(job_main("ray_jobs.tune", search.__doc__ or "", search, check, {}))
