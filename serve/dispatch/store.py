"""Jobs on storage: a directory or URI, where everything is whole or not there.

    jobs/ID/job.json                     the manifest: what was asked for
    jobs/ID/state.json                   how far it is; written now and then, and when the job ends
    jobs/ID/models/model_000000.safetensors
    jobs/ID/quarantined.json             why a damaged job is left alone
    jobs/ID/removed.json                 what the manifest is called once the job is being removed

A model counts as soon as its file is there: what `state.json` does not know yet is found by looking.
"""

import logging
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rpg.client.schema import JobState
from rpg.errors import RPGError
from rpg.storage.errors import StorageError, storage_errors_for
from rpg.storage.files import read_json, sha256, write_json, write_text
from rpg.storage.locations import AnyPath, exists, is_remote
from serve.dispatch.records import JobManifest, JobProgress, Made

_JOBS = "jobs"
_MANIFEST = "job.json"
_STATE = "state.json"
_MODELS = "models"
_QUARANTINED = "quarantined.json"
_REMOVED = "removed.json"
_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_MODEL = re.compile(r"model_(\d{6,})\.safetensors")
_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between attempts to read a job from a storage that fails."""
_OF_ONE_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""What a local file system says of one path, and not because it fails itself."""

_log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Quarantined:
    """A job that cannot be read, and why."""

    id: str
    reason: str


def new_id() -> str:
    """128 random bits: whoever does not know an id does not find it. It is no option of a command line."""
    while (token := secrets.token_urlsafe(16)).startswith("-"):
        pass
    return token


def is_id(text: str) -> bool:
    """Whether `text` could be a job's id; anything else must never become part of a path."""
    return _ID.fullmatch(text) is not None


class JobStore:
    """The jobs below `storage`. Methods block: they read and write files."""

    def __init__(self, storage: AnyPath) -> None:
        self.root = storage

    def models(self, job_id: str) -> AnyPath:
        """Where the models of a job are."""
        return self._directory(job_id) / _MODELS

    def model(self, job_id: str, model: int) -> AnyPath:
        """Where one model of a job is."""
        return self.models(job_id) / f"model_{model:06d}.safetensors"

    def create(self, manifest: JobManifest) -> None:
        """Make a job durable.

        Raises:
            RPGError: if it cannot be written; nothing is left of it then.
        """
        try:
            write_json(self._directory(manifest.id) / _MANIFEST, manifest.to_json())
        except RPGError:
            with suppress(RPGError):
                self.clear(manifest.id)
            raise

    def save(self, job_id: str, progress: JobProgress) -> None:
        """Write how far a job is."""
        write_json(self._directory(job_id) / _STATE, progress.to_json())

    def manifest(self, job_id: str) -> JobManifest:
        """Read what a job asks for.

        Raises:
            RPGError: naming the file, if it is damaged.
        """
        path = self._directory(job_id) / _MANIFEST
        try:
            manifest = JobManifest.from_json(read_json(path, "a job's manifest"))
        except RPGError as error:
            message = str(error)
            raise RPGError(message if str(path) in message else f"{path}: {message}") from error
        if manifest.id != job_id:
            raise RPGError(f"{path}: is the manifest of another job")
        return manifest

    def progress(self, manifest: JobManifest) -> JobProgress:
        """Read how far a job is; of one that has not ended, by looking for its models as well.

        Raises:
            RPGError: naming the file, if it is damaged.
        """
        path = self._directory(manifest.id) / _STATE
        progress = JobProgress(JobState.queued, made={})
        if exists(path):
            try:
                progress = JobProgress.from_json(read_json(path, "a job's state"), len(manifest.job))
            except RPGError as error:
                message = str(error)
                raise RPGError(message if str(path) in message else f"{path}: {message}") from error
        if not progress.state.is_end:
            there = dict(self._models_there(manifest))
            progress.made = {i: made for i, made in progress.made.items() if i in there}
            if manifest.evaluate:
                # What the others are worth is not known: they are made once more, and come out the same.
                return progress
            for index in there.keys() - progress.made.keys():
                path = there[index]
                with storage_errors_for(path):
                    progress.made[index] = Made(index, sha256(path), path.stat().st_size)
        return progress

    def all(self) -> Iterator[tuple[JobManifest, JobProgress] | Quarantined]:
        """Every job; damaged ones are named and left as they are.

        Raises:
            RPGError: or OSError, if the storage fails for longer than a moment: that says nothing about jobs.
        """
        jobs = self.root / _JOBS
        with storage_errors_for(jobs):
            names = sorted(path.name for path in jobs.iterdir()) if jobs.is_dir() else []
        for name in names:
            if not is_id(name):
                continue
            try:
                found: tuple[JobManifest, JobProgress] | Quarantined | None = self._read_patiently(name)
            except (RPGError, OSError) as error:
                if _storage_failed(error):
                    raise
                reason = " ".join(str(error).split())
                with suppress(RPGError):
                    write_json(self._directory(name) / _QUARANTINED, {"reason": reason})
                found = Quarantined(name, reason)
            if found is not None:
                yield found

    def tidy(self, job_id: str) -> None:
        """Remove what killed processes left unfinished among the models of a job that has ended."""
        models = self.models(job_id)
        if not is_remote(models):
            for partial in models.glob(".*.partial"):
                with suppress(OSError):
                    partial.unlink()

    def discard(self, job_id: str) -> None:
        """From here on there is no such job; `clear` removes its files, which may be many.

        Raises:
            RPGError: if the storage refuses; it is a job still.
        """
        directory = self._directory(job_id)
        with _removing(directory):
            if exists(directory / _MANIFEST):
                # Renamed, since a full disk may have no room for another file.
                (directory / _MANIFEST).rename(str(directory / _REMOVED))
            else:
                write_text(directory / _REMOVED, "")

    def clear(self, job_id: str) -> None:
        """Remove the files of a job that is none any more.

        Raises:
            RPGError: if some are left.
        """
        directory = self._directory(job_id)
        with _removing(directory):
            paths: list[AnyPath] = list(directory.iterdir()) if directory.is_dir() else []
            # The mark last: without it, what is left would be taken for a job that lost its manifest.
            for path in sorted(paths, key=lambda path: path.name == _REMOVED):
                _delete(path)
            if not is_remote(directory) and directory.is_dir():
                directory.rmdir()

    def _read_patiently(self, job_id: str) -> tuple[JobManifest, JobProgress] | None:
        for seconds in _PAUSES:
            try:
                return self._read(job_id)
            except (RPGError, OSError) as error:
                if not _storage_failed(error):
                    raise
                _log.warning("job %s: %s; it is tried again", job_id, error)
                time.sleep(seconds)
        return self._read(job_id)

    def _read(self, job_id: str) -> tuple[JobManifest, JobProgress] | None:
        """A job; None if a crash left no more than files to be removed."""
        if not self._is_left_over(job_id):
            manifest = self.manifest(job_id)
            return manifest, self.progress(manifest)
        # Where that fails now, the next start tries it again.
        with suppress(RPGError):
            self.clear(job_id)
        return None

    def _is_left_over(self, job_id: str) -> bool:
        """Whether there is no job, but what a crash left of one while it was being accepted or removed.

        Raises:
            RPGError: if there is no manifest, and nothing that says why: it was lost.
        """
        directory = self._directory(job_id)
        manifest = directory / _MANIFEST
        if exists(manifest):
            return False
        with storage_errors_for(directory):
            names = {path.name for path in directory.iterdir()}
        if _REMOVED in names or all(name.startswith(f".{_MANIFEST}.") for name in names):
            return True
        raise RPGError(f"{manifest}: not found; expected a job's manifest")

    def _models_there(self, manifest: JobManifest) -> Iterator[tuple[int, AnyPath]]:
        directory = self.models(manifest.id)
        with storage_errors_for(directory):
            paths: list[AnyPath] = list(directory.iterdir()) if directory.is_dir() else []
        for path in paths:
            found = _MODEL.fullmatch(path.name)
            if found and int(found[1]) < len(manifest.job):
                yield int(found[1]), path

    def _directory(self, job_id: str) -> AnyPath:
        if not is_id(job_id):
            raise RPGError(f"'{job_id}': not a job's id")
        return self.root / _JOBS / job_id


@contextmanager
def _removing(directory: AnyPath) -> Iterator[None]:
    try:
        with storage_errors_for(directory, "cannot be removed"):
            yield
    except OSError as error:
        raise RPGError(f"{directory}: cannot be removed: {error.strerror}") from error


def _delete(path: AnyPath) -> None:
    if is_remote(path):
        path.fs.rm(path.path, recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(str(path))
    else:
        path.unlink()


def _storage_failed(error: BaseException | None) -> bool:
    """Whether a job could not be read at all, rather than what was read is wrong."""
    while error is not None:
        if isinstance(error, StorageError):
            return True
        if isinstance(error, OSError):
            return not isinstance(error, _OF_ONE_PATH)
        error = error.__cause__
    return False
