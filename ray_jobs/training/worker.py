"""One worker of Ray Train: resumes, trains, reports checkpoints and metrics."""

import dataclasses
import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import ray.train.torch
import torch

from ray_jobs.node_copies import open_shards
from ray_jobs.training.checkpoints import opened
from ray_jobs.training.tracking import log_everywhere, trackers
from ray_jobs.validation import ValidationTasks
from rpg.collection.retokenised import AnyShards, Retokenised
from rpg.config import Config
from rpg.errors import RPGError
from rpg.storage.files import read_json, write_json
from rpg.storage.locations import AnyPath
from rpg.training.progress import TrainingProgress

if TYPE_CHECKING:
    from rpg.training.trainer import Trainer

HISTORY_FILE = "history.json"
GENERATOR_DIRECTORY = "generator"


@dataclass(frozen=True)
class Settings:
    """What every worker is told; see `ray_jobs.training.fitting.fit_generator`."""

    config: Config
    shards: AnyPath
    storage: AnyPath
    name: str
    board: Any
    token_size: int | None
    tasks: ValidationTasks | None
    may_be_stopped: bool
    """Whether to ask the board, whenever something is logged, if to end early."""


class _StoppedError(Exception):
    """All workers raise it at the same step."""


def train_worker(arguments: dict[str, Settings]) -> None:
    """Train as one of Ray Train's workers, from the last complete checkpoint on."""
    settings = arguments["settings"]
    if ray.get(settings.board.refusal.remote()):
        return
    try:
        with suppress(_StoppedError):
            _train(settings)
    except RPGError as error:
        # Trying again would meet the same input: the driver tells, and workers started again end at once.
        ray.get(settings.board.refuse.remote(str(error)))
        if ray.train.get_context().get_world_size() > 1:
            # The others may be waiting for this one.
            raise


def _train(settings: Settings) -> None:
    # Not before: the driver and Ray's controller import this module too, and what trains takes a while.
    from rpg.training.fit import fit, new_trainer

    config = settings.config
    context: Any = ray.get_runtime_context()
    reserved = context.get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(config.ray.train_threads or max(1, min(int(reserved), os.cpu_count() or 1)))
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shards = _open(settings)
    trainer = new_trainer(shards, config.generator, config.train, config.seed, device)
    checkpoints = _Checkpoints(settings, trainer)
    history, first = checkpoints.history, trainer.workers.rank == 0
    places = (config.tracking, config.name, settings.name, settings.storage, Path.cwd(), trainer.step)
    tracking = trackers(*places) if first else []

    def on_log(progress: TrainingProgress) -> None:
        if first:
            row = _row(progress)
            history.append(row)
            log_everywhere(tracking, row)
            settings.board.post.remote(progress)
        if settings.may_be_stopped:
            stopped = ray.get(settings.board.stopped.remote()) if first else False
            if trainer.workers.from_first(float(stopped)):
                raise _StoppedError

    def on_save(trainer: "Trainer", progress: TrainingProgress) -> None:
        checkpoints.save(trainer, progress)
        for tracker in tracking:
            tracker.save()

    validate = settings.tasks.accuracy if settings.tasks else None
    seconds = history[-1]["seconds"] if history else 0.0
    fit(trainer, shards, config.seed, on_log, on_save, validate, seconds)
    for tracker in tracking:
        tracker.close()


def _open(settings: Settings) -> AnyShards:
    shards = open_shards(settings.shards, settings.config.ray)
    return shards if settings.token_size is None else Retokenised(shards, settings.token_size)


class _Checkpoints:
    """Resumes from the last complete checkpoint, and reports new ones.

    A checkpoint holds what resuming needs, the history, and the generator that the run would hand out if it
    ended there: the one of the best validation so far, or without validation that of the same step.
    """

    def __init__(self, settings: Settings, trainer: "Trainer") -> None:
        self._settings = settings
        self._trainer = trainer
        self._first = trainer.workers.rank == 0
        self._best: float | None = None
        self._uploading: Path | None = None
        self.history: list[dict[str, Any]] = []
        # Ray's working directory of this run on this node; what a killed worker left there is of no use.
        self._scratch = Path.cwd() / "checkpoints"
        if self._first:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch.mkdir()
        checkpoint = ray.train.get_checkpoint()
        if checkpoint:
            with opened(checkpoint, settings.storage) as directory:
                self._resume(directory)

    def save(self, trainer: "Trainer", progress: TrainingProgress) -> None:
        """Report a step, with a checkpoint if it is time for one or the generator is the best so far."""
        config, accuracy = self._settings.config.train, progress.validation_accuracy
        best = accuracy is not None and (self._best is None or accuracy > self._best)
        if best:
            self._best = accuracy
        last = progress.step == progress.steps
        if not (best or last or progress.step % config.save_every == 0):
            ray.train.report(_row(progress) if self._first else {})
            return
        generator = trainer.whole_average() if best or self._best is None else None
        if not self._first:
            trainer.save(self._scratch)
            ray.train.report({}, checkpoint_upload_mode=_ASYNC)
            return
        if generator:
            generator.save_pretrained(self._scratch / GENERATOR_DIRECTORY)
        directory = self._new_directory()
        trainer.save(directory)
        # Nothing writes into a generator's files: the next takes the place of the directory as a whole.
        shutil.copytree(
            self._scratch / GENERATOR_DIRECTORY, directory / GENERATOR_DIRECTORY, copy_function=_linked
        )
        write_json(directory / HISTORY_FILE, self.history)
        ray.train.report(
            _row(progress),
            ray.train.Checkpoint.from_directory(directory),
            checkpoint_upload_mode=_ASYNC,
            checkpoint_upload_fn=self._upload,
        )

    def _resume(self, directory: Path) -> None:
        self._trainer.load(directory)
        self.history = read_json(directory / HISTORY_FILE, "a training history")
        accuracies = [row["validation_accuracy"] for row in self.history if "validation_accuracy" in row]
        self._best = max(accuracies, default=None)
        if self._first:
            shutil.copytree(
                directory / GENERATOR_DIRECTORY, self._scratch / GENERATOR_DIRECTORY, copy_function=_linked
            )

    def _new_directory(self) -> Path:
        """A directory for the next checkpoint, once the one before is uploaded: two at most take up disk."""
        while self._uploading and self._uploading.exists():
            time.sleep(0.01)
        self._uploading = Path(tempfile.mkdtemp(dir=self._scratch))
        # It may be renamed into the run's storage, for others to read as well.
        self._uploading.chmod(0o755)
        return self._uploading

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        # Where the driver is dead, this fails: the storage belongs to the job that was started in its place.
        ray.get(self._settings.board.latest.remote())
        try:
            storage: Any = ray.train.get_context().get_storage()
            if isinstance(self._settings.storage, Path):
                place = Path(storage.build_checkpoint_path_from_name(name))
                # On one disk it need not be copied. Where there is no such directory, Ray says so.
                if place.parent.is_dir() and place.parent.stat().st_dev == self._scratch.stat().st_dev:
                    _sync(Path(checkpoint.path))
                    Path(checkpoint.path).rename(place)
                    return ray.train.Checkpoint(str(place), storage.storage_filesystem)
            persisted: ray.train.Checkpoint = storage.persist_current_checkpoint(checkpoint, name)
            shutil.rmtree(checkpoint.path)
            return persisted
        except PermissionError as error:
            reason = f"{self._settings.storage}: cannot be written: {error.strerror or error}"
            ray.get(self._settings.board.refuse.remote(reason))
            raise


def _linked(source: str, target: str) -> None:
    """Like `shutil.copy`, of a file that nobody writes into."""
    try:
        os.link(source, target)
    except OSError:
        # Not every file system has links.
        shutil.copy(source, target)


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


_ASYNC = ray.train.CheckpointUploadMode.ASYNC


def _row(progress: TrainingProgress) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(progress).items() if value is not None}
