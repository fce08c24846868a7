"""Checkpoints of a training run on Ray Train: written, uploaded, resumed from, and read when it has ended.

A checkpoint holds what resuming needs, the history, and the generator that the run would hand out if it ended
there: the one of the best validation so far, or without validation that of the same step.
"""

import dataclasses
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs
import ray
import ray.train

from rpg.generator.saving import WEIGHTS_FILE
from rpg.storage.files import copy_file, read_json, write_json
from rpg.storage.locations import AnyPath
from rpg.training.progress import TrainingProgress

if TYPE_CHECKING:
    from rpg.training.trainer import Trainer

HISTORY_FILE = "history.json"
GENERATOR_DIRECTORY = "generator"

_SNAPSHOT_FILE = "checkpoint_manager_snapshot.json"
"""Ray Train's list of complete checkpoints."""
_ASYNC = ray.train.CheckpointUploadMode.ASYNC


class WorkerCheckpoints:
    """One worker's side of the checkpoints: resumes from the last complete one, and reports new ones.

    Attributes:
        history: rows of what was logged since step 0; the caller appends to it (`history_row`).
    """

    def __init__(
        self,
        trainer: "Trainer",
        storage: AnyPath,
        save_every: int,
        mailbox: Any,
        higher_is_better: bool = True,
    ) -> None:
        """Bring `trainer` to the run's last complete checkpoint, if there is one.

        Args:
            trainer: of this worker.
            storage: directory of training runs.
            save_every: steps from one checkpoint to the next.
            mailbox: handle of the run's `TrainingMailbox`.
            higher_is_better: whether the best generator is the one with the highest validation score.
        """
        self._trainer = trainer
        self._storage = storage
        self._save_every = save_every
        self._mailbox = mailbox
        self._is_first = trainer.workers.rank == 0
        self._higher_is_better = higher_is_better
        self._best_score: float | None = None
        self._uploading: Path | None = None
        self.history: list[dict[str, Any]] = []
        # Ray gives the run a working directory on this node. What a killed worker left there is of no use.
        self._scratch = Path.cwd() / "checkpoints"
        if self._is_first:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch.mkdir()
        checkpoint = ray.train.get_checkpoint()
        if checkpoint:
            with local_directory(checkpoint, storage) as directory:
                self._resume(directory)

    def save(self, progress: TrainingProgress) -> None:
        """Report a step, with a checkpoint if it is time for one or the generator is the best so far."""
        score = progress.validation_score
        is_best = score is not None and self._is_better(score)
        if is_best:
            self._best_score = score
        is_last = progress.step == progress.steps
        if not (is_best or is_last or progress.step % self._save_every == 0):
            ray.train.report(history_row(progress) if self._is_first else {})
            return
        has_own_generator = is_best or self._best_score is None
        generator = self._trainer.whole_average() if has_own_generator else None
        if not self._is_first:
            self._trainer.save(self._scratch)
            ray.train.report({}, checkpoint_upload_mode=_ASYNC)
            return
        if generator:
            generator.save_pretrained(self._scratch / GENERATOR_DIRECTORY)
        directory = self._new_directory()
        self._trainer.save(directory)
        # The copy may share its files with the original: a later generator replaces the directory as a whole,
        # and nothing writes into these files.
        _link_tree(self._scratch / GENERATOR_DIRECTORY, directory / GENERATOR_DIRECTORY)
        write_json(directory / HISTORY_FILE, self.history)
        ray.train.report(
            history_row(progress),
            ray.train.Checkpoint.from_directory(directory),
            checkpoint_upload_mode=_ASYNC,
            checkpoint_upload_fn=self._upload,
        )

    def _is_better(self, score: float) -> bool:
        if self._best_score is None:
            return True
        return score > self._best_score if self._higher_is_better else score < self._best_score

    def _resume(self, directory: Path) -> None:
        self._trainer.load(directory)
        self.history = read_json(directory / HISTORY_FILE, "a training history")
        scores = [row["validation_score"] for row in self.history if "validation_score" in row]
        self._best_score = (max if self._higher_is_better else min)(scores, default=None)
        if self._is_first:
            _link_tree(directory / GENERATOR_DIRECTORY, self._scratch / GENERATOR_DIRECTORY)

    def _new_directory(self) -> Path:
        """A directory for the next checkpoint, once the one before is uploaded: at most two take up disk."""
        while self._uploading and self._uploading.exists():
            time.sleep(0.01)
        self._uploading = Path(tempfile.mkdtemp(dir=self._scratch))
        # The directory may be renamed into the run's storage, where others read it as well.
        self._uploading.chmod(0o755)
        return self._uploading

    def _upload(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        # This call fails where the driver is dead. The storage then belongs to the job that was started in
        # the driver's place, and this worker must not write to it.
        ray.get(self._mailbox.progress.remote())
        try:
            storage: Any = ray.train.get_context().get_storage()
            if isinstance(self._storage, Path):
                place = Path(storage.build_checkpoint_path_from_name(name))
                # On one disk a rename is enough. If the directory is missing, Ray's upload raises the error.
                if place.parent.is_dir() and place.parent.stat().st_dev == self._scratch.stat().st_dev:
                    _sync(Path(checkpoint.path))
                    Path(checkpoint.path).rename(place)
                    return ray.train.Checkpoint(str(place), storage.storage_filesystem)
            persisted: ray.train.Checkpoint = storage.persist_current_checkpoint(checkpoint, name)
            shutil.rmtree(checkpoint.path)
            return persisted
        except PermissionError as error:
            reason = f"{self._storage}: cannot be written: {error.strerror or error}"
            ray.get(self._mailbox.refuse.remote(reason))
            raise


def history_row(progress: TrainingProgress) -> dict[str, Any]:
    """A row of the history: the numbers of `progress` that are not None."""
    values = dataclasses.asdict(progress)
    del values["validation_note"]
    return {key: value for key, value in values.items() if value is not None}


@contextmanager
def local_directory(checkpoint: ray.train.Checkpoint, storage: AnyPath) -> Iterator[Path]:
    """Yield a directory on this machine with the content of `checkpoint`, for reading only.

    Ray would copy the checkpoint from any file system but pyarrow's own local one, and `storage` is written
    with another (`ray_jobs.training.atomic_files`). A checkpoint has several times the size of its generator,
    so one on a local disk is read where it lies.
    """
    if isinstance(storage, Path):
        yield Path(checkpoint.path)
        return
    with checkpoint.as_directory() as directory:
        yield Path(directory)


def copy_generator(checkpoint: ray.train.Checkpoint, storage: AnyPath, target: AnyPath) -> None:
    """Copy generator and history of `checkpoint`, of a run in `storage`, into the directory `target`."""
    with local_directory(checkpoint, storage) as directory:
        copy_file(directory / HISTORY_FILE, target / HISTORY_FILE)
        # The weights come last, because their file is what makes a directory count as a generator. Behind a
        # URI a directory cannot be renamed into its place, so others may see it half copied.
        generator = directory / GENERATOR_DIRECTORY
        files = [path for path in generator.rglob("*") if path.is_file()]
        for file in sorted(files, key=lambda file: file.name == WEIGHTS_FILE):
            copy_file(file, target / file.relative_to(generator))


def remove_interrupted_uploads(filesystem: Any, run: str) -> None:
    """Remove the checkpoints in the directory `run` that Ray Train does not list as complete."""
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(run, allow_not_found=True))
    complete: set[str] = set()
    for info in found:
        if info.base_name == _SNAPSHOT_FILE:
            with filesystem.open_input_stream(info.path) as file:
                state = json.loads(file.read())
            complete = {result["checkpoint_dir_name"] for result in state["checkpoint_results"]}
    for info in found:
        if info.base_name.startswith("checkpoint_") and info.base_name not in complete | {_SNAPSHOT_FILE}:
            filesystem.delete_dir(info.path)


def _link_tree(source: Path, target: Path) -> None:
    """Copy a directory whose files nobody writes into; files are hard links where the disk has such."""
    shutil.copytree(source, target, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
