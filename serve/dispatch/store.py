"""Jobs on storage: a directory or URI, where everything is whole or not there.

    jobs/ID/job.json                     the manifest: what was asked for
    jobs/ID/state.json                   how far it is; written now and then, and when the job ends
    jobs/ID/models/model_000000.safetensors
    jobs/ID/models/pack_000000_1f0e9c2a.tar  models 0 and others, where the job asked for packs
    jobs/ID/quarantined.json             why a damaged job is left alone
    jobs/ID/removed.json                 what the manifest is called once the job is being removed
    companions/DIGEST/NAME               what lies beside the weights of all models of one generator

A model is finished as soon as its file is there. Models that `state.json` does not name yet are found when
the service starts.

Others can write to the storage: people, backups, other jobs. So nothing outside of it is read, written or
removed (`rpg.storage.below`), sizes are measured, and a job whose records contradict its files is
quarantined.
"""

import io
import logging
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, NamedTuple

from rpg.client.schema import JobState
from rpg.collection.companions import COMPANIONS_DIRECTORY, Companions, companions_of
from rpg.collection.safetensors_file import read_metadata
from rpg.errors import RPGError, one_line
from rpg.sampling.pack import PACK_PATTERN, MemberFile, members_of
from rpg.storage.below import (
    Listed,
    NotOrdinaryError,
    check_ordinary_below,
    list_below,
    make_directory_below,
    open_below,
    remove_below,
    rename_below,
)
from rpg.storage.errors import StorageError, storage_errors_for
from rpg.storage.files import PARTIAL_SUFFIX, read_json, sha256_of, write_json, write_text
from rpg.storage.locations import AnyPath, is_remote
from serve.dispatch.records import JobManifest, JobProgress, Made

_JOBS = "jobs"
_MANIFEST = "job.json"
_STATE = "state.json"
_MODELS = "models"
_QUARANTINED = "quarantined.json"
_REMOVED = "removed.json"
_ID = re.compile(r"[A-Za-z0-9_-]{22}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MODEL = re.compile(r"model_([0-9]{6}|[1-9][0-9]{6,17})\.safetensors")
_PACK = re.compile(PACK_PATTERN)
MOST_RECORD_BYTES = 2**27
"""Of a job's manifest or state: some hundred bytes a model, and some ten for each value of a condition."""
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
        return self.models(job_id) / _model_name(model)

    def open_model(self, job_id: str, model: int) -> IO[bytes]:
        """Open the weights of one model of a job.

        Raises:
            RPGError: naming what is no regular file below the storage; or OSError, if it cannot be opened.
        """
        with storage_errors_for(self.model(job_id, model)):
            return open_below(self.root, f"{self._name(job_id)}/{_MODELS}/{_model_name(model)}")

    def open_packed(self, job_id: str, pack: str, offset: int, size: int) -> IO[bytes]:
        """Open the weights of one model, which are `size` bytes of a pack from `offset` on.

        Raises:
            RPGError: naming what is no regular file below the storage; or OSError, if it cannot be opened.
        """
        with storage_errors_for(self.models(job_id) / pack):
            file = open_below(self.root, f"{self._name(job_id)}/{_MODELS}/{pack}")
        # Buffered, it is an ordinary file for all that reads it.
        return io.BufferedReader(MemberFile(file, offset, size))

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
            with storage_errors_for(self.root):
                check_ordinary_below(self.root, f"{COMPANIONS_DIRECTORY}/{digest}")
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
        if companions:
            try:
                make_directory_below(self.root, f"{COMPANIONS_DIRECTORY}/{digest}")
            except OSError as error:
                raise RPGError(f"{directory}: cannot be written: {error.strerror}") from error
        if companions and not companions.are_in(directory):
            companions.write(directory)

    def create(self, manifest: JobManifest) -> None:
        """Write a new job.

        Raises:
            RPGError: if it cannot be written; nothing is left of it then.
        """
        try:
            write_json(self._directory(manifest.id) / _MANIFEST, manifest.to_json(), self.root)
        except RPGError:
            with suppress(RPGError):
                self.remove_files(manifest.id)
            raise

    def save(self, job_id: str, progress: JobProgress) -> None:
        """Write how far a job is.

        Raises:
            RPGError: if it cannot be written.
        """
        write_text(self._directory(job_id) / _STATE, progress.to_json(), self.root)

    def manifest(self, job_id: str) -> JobManifest:
        """Read what a job asks for.

        Raises:
            RPGError: naming the file, if it is damaged.
        """
        path = self._directory(job_id) / _MANIFEST
        with _naming(path):
            manifest = JobManifest.from_json(self._read_record(path, "a job's manifest"))
        if manifest.id != job_id:
            raise RPGError(f"{path}: is the manifest of another job")
        return manifest

    def progress(self, manifest: JobManifest) -> JobProgress:
        """Read how far a job is. For one that has not ended, its directory is searched for models as well.

        Of one that has not ended, a model whose file is not whole, or not the one that the state names,
        counts as not made.

        Raises:
            RPGError: naming the file that is damaged, or that contradicts the files of the models.
        """
        path = self._directory(manifest.id) / _STATE
        progress = JobProgress(JobState.queued, made={})
        with storage_errors_for(path):
            has_state = _STATE in list_below(self.root, self._name(manifest.id))
        if has_state:
            with _naming(path):
                progress = JobProgress.from_json(
                    self._read_record(path, "a job's state"), manifest.job.models
                )
        with storage_errors_for(self.models(manifest.id)):
            listed = list_below(self.root, f"{self._name(manifest.id)}/{_MODELS}")
        if progress.state.is_end:
            _check_agrees(path, progress, manifest, listed)
            return progress
        whole = {
            place.model: found
            for place in self._places(manifest, listed)
            if (found := self._found_model(manifest, place, progress.digest)) is not None
        }
        known = progress.made
        progress.made = {
            i: made._replace(pack=whole[i].made.pack, offset=whole[i].made.offset)
            for i, made in known.items()
            if i in whole and made.is_file(whole[i].made)
        }
        if manifest.evaluate:
            # The accuracy of the models that the state does not name is unknown, so they are made again.
            # They come out the same, to the byte.
            return progress
        for index, found in whole.items():
            if index not in known:
                # All models of a job come from one version of a generator.
                progress.digest = progress.digest or found.generator
                if found.generator == progress.digest:
                    progress.made[index] = found.made
        return progress

    def all(self) -> Iterator[tuple[JobManifest, JobProgress] | Quarantined]:
        """Read every job. Damaged ones are quarantined: they are named, and their files stay as they are.

        Raises:
            RPGError: or OSError, if the storage fails for longer than a moment, which quarantines no job.
        """
        jobs = self.root / _JOBS
        with storage_errors_for(jobs):
            listed = list_below(self.root, _JOBS)
        for name in sorted(filter(is_id, listed)):
            try:
                if not listed[name].is_directory:
                    raise NotOrdinaryError(f"{jobs / name}: is no directory; expected that of a job")
                found: tuple[JobManifest, JobProgress] | Quarantined | None = self._read_with_retries(name)
            # A damaged record may make its reader fail in any way, and the other jobs go on.
            except Exception as error:
                if _storage_failed(error):
                    raise
                reason = one_line(error)
                # Through a link nothing is written.
                with suppress(RPGError):
                    write_json(self._directory(name) / _QUARANTINED, {"reason": reason}, self.root)
                found = Quarantined(name, reason)
            if found is not None:
                yield found

    def remove_partial_files(self, job_id: str) -> None:
        """Remove what killed processes left unfinished among the models of a job that has ended."""
        if is_remote(self.root):
            return
        models = f"{self._name(job_id)}/{_MODELS}"
        with suppress(RPGError, OSError):
            for name in list_below(self.root, models):
                if name.startswith(".") and name.endswith(PARTIAL_SUFFIX):
                    with suppress(OSError):
                        remove_below(self.root, f"{models}/{name}")

    def mark_removed(self, job_id: str) -> None:
        """Remove a job, at once and as a whole; `remove_files` then removes its files, which may be many.

        Raises:
            RPGError: if the storage refuses; the job is still there.
        """
        directory, name = self._directory(job_id), self._name(job_id)
        with _removing(directory):
            try:
                listed = list_below(self.root, name)
            except NotOrdinaryError:
                # A link in the place of a job has no files of its own.
                return
            if _MANIFEST not in listed:
                write_text(directory / _REMOVED, "", self.root)
                return
            if _REMOVED in listed:
                remove_below(self.root, f"{name}/{_REMOVED}")
            # The manifest is renamed, because a full disk may have no room for another file.
            rename_below(self.root, f"{name}/{_MANIFEST}", _REMOVED)

    def remove_files(self, job_id: str) -> None:
        """Remove the files of a job that `mark_removed` has removed.

        Raises:
            RPGError: if some are left.
        """
        name = self._name(job_id)
        with _removing(self._directory(job_id)), suppress(FileNotFoundError):
            try:
                listed = list_below(self.root, name)
            except NotOrdinaryError:
                # The link goes, and what it leads to stays.
                remove_below(self.root, name)
                return
            # The mark goes last. Without it, the files left would look like a job that lost its manifest.
            for each in sorted(listed, key=lambda each: each == _REMOVED):
                remove_below(self.root, f"{name}/{each}")
            if not is_remote(self.root):
                remove_below(self.root, name)

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
        manifest = self._directory(job_id) / _MANIFEST
        with storage_errors_for(manifest.parent):
            names = list_below(self.root, self._name(job_id)).keys()
        if _MANIFEST in names:
            return False
        if _REMOVED in names or all(name.startswith(f".{_MANIFEST}.") for name in names):
            return True
        raise RPGError(f"{manifest}: not found; expected a job's manifest")

    def _read_record(self, path: AnyPath, what: str) -> object:
        return read_json(path, what, root=self.root, most_bytes=MOST_RECORD_BYTES)

    def _places(self, manifest: JobManifest, listed: Mapping[str, Listed]) -> Iterator["_Place"]:
        """Where models of a job lie, by the names of files and of packs' members, in order of the names."""
        for name in sorted(listed):
            if (size := listed[name].size) is None:
                continue
            if (index := _index(name, manifest)) is not None:
                yield _Place(index, None, 0, size)
            if not _PACK.fullmatch(name):
                continue
            path = self.models(manifest.id) / name
            try:
                with storage_errors_for(path), self.open_packed(manifest.id, name, 0, size) as pack:
                    members = list(members_of(pack))
            except (NotOrdinaryError, FileNotFoundError):
                continue
            for member in members:
                if (index := _index(member.name, manifest)) is not None:
                    yield _Place(index, name, member.offset, member.size)

    def _open(self, job_id: str, place: "_Place") -> IO[bytes]:
        if place.pack is None:
            return self.open_model(job_id, place.model)
        return self.open_packed(job_id, place.pack, place.offset, place.size)

    def _found_model(
        self, manifest: JobManifest, place: "_Place", digest: str | None
    ) -> "_FoundModel | None":
        """What a file says that lies where a model belongs; None if it is not whole, or another one's."""
        index = place.model
        path = self.model(manifest.id, index) if place.pack is None else self.models(manifest.id) / place.pack
        with storage_errors_for(path):
            try:
                with self._open(manifest.id, place) as file:
                    metadata, size = read_metadata(file)
                    file.seek(0)
                    digest_found = sha256_of(file)
            except (NotOrdinaryError, FileNotFoundError):
                return None
            except ValueError as error:
                _log.warning("%s: model %d is made again: %s", path, index, error)
                return None
        generator = metadata.get("rpg.generator", "")
        # Files without provenance are of no generator that is served.
        if metadata.get("rpg.index") != str(index) or digest not in (None, generator):
            _log.warning("%s: model %d is made again: it is another model", path, index)
            return None
        return _FoundModel(Made(index, digest_found, size, pack=place.pack, offset=place.offset), generator)

    def _name(self, job_id: str) -> str:
        """The name of a job's directory below the root."""
        if not is_id(job_id):
            raise RPGError(f"'{job_id}': not a job's id")
        return f"{_JOBS}/{job_id}"

    def _directory(self, job_id: str) -> AnyPath:
        return self.root / self._name(job_id)


class _Place(NamedTuple):
    """Where a model lies: in a file of its own, or so many bytes of a pack."""

    model: int
    pack: str | None
    offset: int
    size: int


@dataclass(frozen=True)
class _FoundModel:
    made: Made
    generator: str
    """Digest of the generator that made it."""


def _model_name(index: int) -> str:
    return f"model_{index:06d}.safetensors"


def _index(name: str, manifest: JobManifest) -> int | None:
    """The index of the model that a file of this name holds; None if it is no model of the job."""
    found = _MODEL.fullmatch(name)
    return int(found[1]) if found and int(found[1]) < manifest.job.models else None


def _check_agrees(
    path: AnyPath, progress: JobProgress, manifest: JobManifest, listed: Mapping[str, Listed]
) -> None:
    """Check that the state of a job that has ended says what is there.

    Raises:
        RPGError: naming the file of the state, and what contradicts it.
    """
    models = manifest.job.models
    if progress.state == JobState.succeeded and len(progress.made) != models:
        raise RPGError(f"{path}: says that the job succeeded, with {len(progress.made)} of {models} models")
    for index, made in progress.made.items():
        name = made.pack or _model_name(index)
        size = listed[name].size if name in listed else None
        if size is None or (size < made.offset + made.bytes if made.pack else size != made.bytes):
            there = "is no regular file" if size is None else f"has {size} bytes"
            at = f" from byte {made.offset} on" if made.pack else ""
            raise RPGError(f"{path}: model {index}: says {made.bytes} bytes{at}; {name} {there}")


@contextmanager
def _naming(path: AnyPath) -> Iterator[None]:
    """Name the file in errors about its content."""
    try:
        yield
    except RPGError as error:
        message = str(error)
        raise RPGError(message if str(path) in message else f"{path}: {message}") from error


@contextmanager
def _removing(directory: AnyPath) -> Iterator[None]:
    try:
        with storage_errors_for(directory, "cannot be removed"):
            yield
    except OSError as error:
        raise RPGError(f"{directory}: cannot be removed: {error.strerror}") from error


def _storage_failed(error: BaseException | None) -> bool:
    """Whether the storage failed, and not what was read from it is wrong."""
    while error is not None:
        if isinstance(error, StorageError | MemoryError):
            return True
        if isinstance(error, NotOrdinaryError):
            return False
        if isinstance(error, OSError):
            return not isinstance(error, _ERRORS_OF_ONE_PATH)
        error = error.__cause__
    return False
