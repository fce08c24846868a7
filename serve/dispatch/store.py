"""Jobs on storage: a directory or URI, where everything is whole or not there.

    jobs/ID/job.json                     the manifest: what was asked for
    jobs/ID/state.json                   how far it is; written now and then, and when the job ends
    jobs/ID/models/model_000000.safetensors
    jobs/ID/quarantined.json             why a damaged job is left alone
    jobs/ID/removed.json                 what the manifest is called once the job is being removed
    companions/DIGEST/NAME               what lies beside the weights of all models of one generator

A model is finished as soon as its file is there. Models that `state.json` does not name yet are found when
the service starts.
"""

import logging
import re
import secrets
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from rpg.client.schema import JobState
from rpg.collection.companions import COMPANIONS_DIRECTORY, Companions, companions_of
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
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MODEL = re.compile(r"model_(\d{6,})\.safetensors")
_KEPT_COMPANIONS = 8
_ERRORS_OF_ONE_PATH = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors of a local file system that say something about one path, and nothing about the file system."""

_log = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class Quarantined:
    """A job that cannot be read, and why."""

    id: str
    reason: str


def new_id() -> str:
    """128 random bits, so that nobody guesses an id."""
    # An id is an argument of commands, where a leading - would make it an option.
    while (token := secrets.token_urlsafe(16)).startswith("-"):
        pass
    return token


def is_id(text: str) -> bool:
    """Whether `text` could be a job's id; anything else must never become part of a path."""
    return _ID.fullmatch(text) is not None


class JobStore:
    """The jobs below `storage`. Methods block: they read and write files."""

    def __init__(self, storage: AnyPath, retry_seconds: Sequence[float] = (0.5, 1.0, 2.0, 4.0)) -> None:
        """`retry_seconds`: pauses between the attempts to read a job from a storage that fails."""
        self.root = storage
        self._retry_seconds = retry_seconds
        self._companions: OrderedDict[str, Companions] = OrderedDict()

    def models(self, job_id: str) -> AnyPath:
        """The directory of a job's models."""
        return self._directory(job_id) / _MODELS

    def model(self, job_id: str, model: int) -> AnyPath:
        """The weights of one model of a job."""
        return self.models(job_id) / f"model_{model:06d}.safetensors"

    def companions(self, digest: str | None) -> Companions:
        """What lies beside the weights of the models that the generator with this digest has made.

        The digest stands for the companions too, so they are read once.

        Raises:
            RPGError: naming the file that cannot be read.
        """
        if digest is None or not _DIGEST.fullmatch(digest):
            return Companions()
        found = self._companions.get(digest)
        if found is None:
            found = self._companions[digest] = companions_of(self.root / COMPANIONS_DIRECTORY / digest)
            if len(self._companions) > _KEPT_COMPANIONS:
                self._companions.popitem(last=False)
        return found

    def keep_companions(self, digest: str, companions: Companions) -> None:
        """Write a generator's companions, unless they are there, before it makes its first model.

        Raises:
            RPGError: naming the file that cannot be written.
        """
        directory = self.root / COMPANIONS_DIRECTORY / digest
        if companions and not companions.are_in(directory):
            companions.write(directory)

    def create(self, manifest: JobManifest) -> None:
        """Write a new job.

        Raises:
            RPGError: if it cannot be written; nothing is left of it then.
        """
        try:
            write_json(self._directory(manifest.id) / _MANIFEST, manifest.to_json())
        except RPGError:
            with suppress(RPGError):
                self.remove_files(manifest.id)
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
        """Read how far a job is. For one that has not ended, its directory is searched for models as well.

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
            found = dict(self._found_models(manifest))
            progress.made = {i: made for i, made in progress.made.items() if i in found}
            if manifest.evaluate:
                # The accuracy of the models that the state does not name is unknown, so they are made again.
                # They come out the same, to the byte.
                return progress
            for index in found.keys() - progress.made.keys():
                path = found[index]
                with storage_errors_for(path):
                    progress.made[index] = Made(index, sha256(path), path.stat().st_size)
        return progress

    def all(self) -> Iterator[tuple[JobManifest, JobProgress] | Quarantined]:
        """Read every job. Damaged ones are quarantined: they are named, and their files stay as they are.

        Raises:
            RPGError: or OSError, if the storage fails for longer than a moment, which quarantines no job.
        """
        jobs = self.root / _JOBS
        with storage_errors_for(jobs):
            names = sorted(path.name for path in jobs.iterdir()) if jobs.is_dir() else []
        for name in names:
            if not is_id(name):
                continue
            try:
                found: tuple[JobManifest, JobProgress] | Quarantined | None = self._read_with_retries(name)
            except (RPGError, OSError) as error:
                if _storage_failed(error):
                    raise
                reason = " ".join(str(error).split())
                with suppress(RPGError):
                    write_json(self._directory(name) / _QUARANTINED, {"reason": reason})
                found = Quarantined(name, reason)
            if found is not None:
                yield found

    def remove_partial_files(self, job_id: str) -> None:
        """Remove what killed processes left unfinished among the models of a job that has ended."""
        models = self.models(job_id)
        if not is_remote(models):
            for partial in models.glob(".*.partial"):
                with suppress(OSError):
                    partial.unlink()

    def mark_removed(self, job_id: str) -> None:
        """Remove a job, at once and as a whole; `remove_files` then removes its files, which may be many.

        Raises:
            RPGError: if the storage refuses; the job is still there.
        """
        directory = self._directory(job_id)
        with _removing(directory):
            if exists(directory / _MANIFEST):
                # The manifest is renamed, because a full disk may have no room for another file.
                (directory / _MANIFEST).rename(str(directory / _REMOVED))
            else:
                write_text(directory / _REMOVED, "")

    def remove_files(self, job_id: str) -> None:
        """Remove the files of a job that `mark_removed` has removed.

        Raises:
            RPGError: if some are left.
        """
        directory = self._directory(job_id)
        with _removing(directory):
            paths: list[AnyPath] = list(directory.iterdir()) if directory.is_dir() else []
            # The mark goes last. Without it, the files left would look like a job that lost its manifest.
            for path in sorted(paths, key=lambda path: path.name == _REMOVED):
                _delete(path)
            if not is_remote(directory) and directory.is_dir():
                directory.rmdir()

    def _read_with_retries(self, job_id: str) -> tuple[JobManifest, JobProgress] | None:
        for seconds in self._retry_seconds:
            try:
                return self._read(job_id)
            except (RPGError, OSError) as error:
                if not _storage_failed(error):
                    raise
                _log.warning("job %s: %s; it is tried again", job_id, error)
                time.sleep(seconds)
        return self._read(job_id)

    def _read(self, job_id: str) -> tuple[JobManifest, JobProgress] | None:
        """A job; None where a crash has left some files of one, which are removed."""
        if not self._is_left_over(job_id):
            manifest = self.manifest(job_id)
            return manifest, self.progress(manifest)
        # Files that cannot be removed now are removed by the next start.
        with suppress(RPGError):
            self.remove_files(job_id)
        return None

    def _is_left_over(self, job_id: str) -> bool:
        """Whether a crash has left these files of a job that was being accepted or removed.

        Raises:
            RPGError: if the manifest is missing for another reason: it was lost.
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

    def _found_models(self, manifest: JobManifest) -> Iterator[tuple[int, AnyPath]]:
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
    """Whether the storage failed, and not what was read from it is wrong."""
    while error is not None:
        if isinstance(error, StorageError):
            return True
        if isinstance(error, OSError):
            return not isinstance(error, _ERRORS_OF_ONE_PATH)
        error = error.__cause__
    return False
