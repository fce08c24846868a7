"""A search on Ray Tune: each trial is a run of Ray Train, and ASHA ends the worst ones early."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

# The job shows its own progress, and metrics go where training writes them.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
# Ray warns of many worker processes. A trial has several, most of which only wait.
os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")

import ray
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from ray_jobs.run_paths import RunPaths
from ray_jobs.search.results import TrialResult
from ray_jobs.search.trial import Trial
from ray_jobs.training.atomic_files import storage_filesystem
from ray_jobs.training.checkpoints import copy_generator
from ray_jobs.training.fitting import fit_generator
from ray_jobs.training.mailbox import TrainingMailbox
from rpg.config import Config
from rpg.generator.saving import WEIGHTS_FILE
from rpg.storage.directories import remove_directory, replacing_directory
from rpg.storage.files import read_json, write_json
from rpg.storage.locations import AnyPath, exists

_TRIAL, _ROUND, _SCORE = "trial", "round", "score"
_EXPERIMENT = "search"


class SearchStatus(NamedTuple):
    """How far a search is."""

    ended: int = 0
    """Trials that have ended."""
    running: int = 0
    """Trials that are running."""
    best: tuple[int, float] | None = None
    """Index and score of the trial that is best so far."""


@ray.remote(num_cpus=0)
class SearchMailbox:
    """An actor to which the search reports its status, for the driver to read."""

    def __init__(self) -> None:
        self._status = SearchStatus()

    def report(self, status: SearchStatus) -> None:
        """Replace the status."""
        self._status = status

    def status(self) -> SearchStatus:
        """The status that was last reported."""
        return self._status


def run_directory(config: Config, name: str) -> AnyPath:
    """Where a search called `name` keeps what resuming needs."""
    return RunPaths.of(config).root / "tune" / name


@ray.remote(num_cpus=0)
def search_task(
    config: Config, trials: list[Trial], name: str, rounds: int, mailbox: Any, higher_is_better: bool
) -> list[TrialResult]:
    """Run Ray Tune; trials that a stopped search of this name has begun go on where they were.

    This is a task of its own, so that the driver keeps Ctrl-C and the progress display.

    Args:
        config: of the run.
        trials: what is tried; each is known by its index.
        name: of this search; it stands for all that determines its result.
        rounds: equal parts of a trial's budget, after each of which it is validated.
        mailbox: handle of a `SearchMailbox`.
        higher_is_better: whether the best trial has the highest score.
    """
    directory = run_directory(config, name)
    filesystem, root = storage_filesystem(directory)
    function = _trainable(trials, RunPaths.of(config).shards, directory / "train", rounds)
    # The workers of Ray Train reserve what they need. Tune asks for some resource to place the trial by.
    trainable = ray.tune.with_resources(function, {"memory": 1})
    # Ray keeps a search as a pickle, which is never read again: each trial's record says how far it came.
    remove_directory(directory / _EXPERIMENT)
    tuner = ray.tune.Tuner(
        trainable,
        param_space={_TRIAL: ray.tune.grid_search(list(range(len(trials))))},
        tune_config=ray.tune.TuneConfig(
            metric=_SCORE,
            mode="max" if higher_is_better else "min",
            scheduler=_GracefulASHA(
                time_attr=_ROUND,
                max_t=rounds,
                grace_period=1,
                reduction_factor=config.tune.reduction,
                stop_last_trials=False,
            ),
            max_concurrent_trials=_concurrent_trials(config),
        ),
        run_config=ray.tune.RunConfig(
            name=_EXPERIMENT,
            storage_path=root,
            storage_filesystem=filesystem,
            verbose=0,
            callbacks=[_StatusCallback(mailbox, higher_is_better)],
        ),
    )
    grid = tuner.fit()
    return [_result(trials, grid[i], rounds, directory / "train") for i in range(len(grid))]


def _trainable(
    trials: list[Trial], shards: AnyPath, storage: AnyPath, rounds: int
) -> Callable[[dict[str, Any]], None]:
    """The function with which Ray Tune runs a trial."""

    def trainable(parameters: dict[str, Any]) -> None:
        trial = trials[parameters[_TRIAL]]
        config, record = trial.config, storage / f"{trial.name}.json"
        forward = TuneReportCallback()  # type: ignore[no-untyped-call]
        done: list[dict[str, Any]] = read_json(record, "a trial's rounds") if exists(record) else []
        for each in done:
            ray.tune.report(each)
        if last_round(done) == rounds:
            return

        def reporting(every: int, before: int, seconds: float) -> Callable[[dict[str, Any]], None]:
            """Reports the rounds of a stage, before which there were so many rounds and seconds."""

            def on_report(metrics: dict[str, Any]) -> None:
                score, step = metrics.get("validation_score"), metrics["step"]
                number = before + step // every
                # Training that is resumed may repeat rounds that have been reported.
                if score is not None and step % every == 0 and number > last_round(done):
                    spent = seconds + metrics["seconds"]
                    done.append({_ROUND: number, _SCORE: score, "seconds": spent})
                    write_json(record, done)
                    forward.after_report(None, [done[-1]], None)  # type: ignore[arg-type]

            return on_report

        mailbox = TrainingMailbox.options(name=_mailbox_name(parameters[_TRIAL])).remote()  # type: ignore[attr-defined]
        size, fitted = config.shard.token_size, storage / f"{trial.name}-fitted"
        if not exists(fitted / WEIGHTS_FILE):
            on_report = reporting(config.train.validate_every, 0, 0.0)
            fit = fit_generator(config, shards, storage, trial.name, mailbox, size, on_report).checkpoint
            assert fit is not None
            if trial.fitting_rounds < rounds and not ray.get(mailbox.is_stop_requested.remote()):
                with replacing_directory(fitted) as target:
                    copy_generator(fit, storage, target)
        if exists(fitted / WEIGHTS_FILE):
            every, before = config.refine.validate_every, trial.fitting_rounds
            seconds = max((each["seconds"] for each in done if each[_ROUND] <= before), default=0.0)
            on_report, name = reporting(every, before, seconds), f"{trial.name}-refined"
            fit_generator(config, shards, storage, name, mailbox, None, on_report, fitted)
        progress = ray.get(mailbox.progress.remote())
        if progress and progress.validation_score is None and progress.validation_note:
            # Ray Tune takes in no round without a score.
            write_json(_reason_file(storage, trial), progress.validation_note)

    return trainable


def _reason_file(storage: AnyPath, trial: Trial) -> AnyPath:
    """Where a trial keeps why the networks that it last made could not be measured."""
    return storage / f"{trial.name}.reason.json"


def last_round(done: list[dict[str, Any]]) -> int:
    """The last round that a trial has reported; one whose networks could not be measured is passed over."""
    return int(done[-1][_ROUND]) if done else 0


def _result(trials: list[Trial], result: ray.tune.Result, rounds: int, storage: AnyPath) -> TrialResult:
    assert result.config is not None
    trial, metrics = trials[int(result.config[_TRIAL])], result.metrics or {}
    score, failure = metrics.get(_SCORE), None
    if exists(reason := _reason_file(storage, trial)):
        failure = f"networks could not be measured: {read_json(reason, 'a reason')}"
    elif score is None:
        failure = "the networks that it generated could not be measured"
    if result.error:
        score, failure = None, str(result.error).strip().splitlines()[-1]
    share = int(metrics.get(_ROUND, 0)) / rounds
    return TrialResult(trial, score, share, float(metrics.get("seconds", 0.0)), failure)


def _concurrent_trials(config: Config) -> int:
    """Trials that the cluster has room for at a time."""
    if config.tune.concurrent:
        return config.tune.concurrent
    there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = config.ray.train_workers
    if config.ray.use_gpu:
        return max(1, int(there.get("GPU", 0)) // workers)
    return max(1, int(there.get("CPU", 1)) // (workers * config.ray.train_threads))


class _GracefulASHA(ASHAScheduler):
    """ASHA that asks a trial to end where Ray Tune would kill it.

    If the controller of a run of Ray Train is killed, the CPUs that it reserved are never given back.
    """

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ask the trial to end if ASHA would stop it; Ray Tune itself lets it go on until it does."""
        if super().on_trial_result(tune_controller, trial, result) == self.STOP:
            with suppress(ValueError):  # The mailbox is gone if the trial has ended already.
                ray.get_actor(_mailbox_name(trial.config[_TRIAL])).request_stop.remote()
        return str(self.CONTINUE)


def _mailbox_name(trial: int) -> str:
    return f"mailbox of trial {trial}"


class _StatusCallback(ray.tune.Callback):
    """Reports the search's status to its mailbox."""

    def __init__(self, mailbox: Any, higher_is_better: bool) -> None:
        self._mailbox = mailbox
        self._best = max if higher_is_better else min

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        ended = sum(trial.status in (trial.TERMINATED, trial.ERROR) for trial in trials)
        running = sum(trial.status == trial.RUNNING for trial in trials)
        scores = [
            (trial.last_result[_SCORE], trial.config[_TRIAL])
            for trial in trials
            if _SCORE in (trial.last_result or {})
        ]
        best = self._best(scores, default=None)
        self._mailbox.report.remote(SearchStatus(ended, running, best and (best[1], best[0])))
