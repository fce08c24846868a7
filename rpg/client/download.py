"""Downloading a model: it is hashed while it arrives, and kept only if its digest is the right one."""

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rpg.client.schema import CompanionFile, ModelFile
from rpg.errors import RPGError
from rpg.storage.files import sha256
from rpg.storage.locks import LockedError, exclusive_lock

_BLOCK = 2**20


@dataclass(frozen=True)
class DirectoryForm:
    """What makes a directory of a model's weights: their name, and the content of the other files by name."""

    weights: str
    companions: Mapping[str, bytes]


class PartialFile:
    """The bytes of `model` that have arrived, in a binary file that can be read, written and cut."""

    def __init__(self, file: IO[bytes], model: ModelFile | CompanionFile, name: str) -> None:
        self.model = model
        self.name = name
        """What messages call it."""
        self.size = 0
        self._file = file
        self._digest = hashlib.sha256()

    def read_what_is_there(self) -> None:
        """Count what an earlier download left in the file."""
        while block := self._file.read(_BLOCK):
            self._digest.update(block)
            self.size += len(block)
        if self.size > self.model.bytes:
            self.restart()

    def write(self, block: bytes) -> None:
        """Add what arrived.

        Raises:
            RPGError: if it is more than the model has, or cannot be written.
        """
        if self.size + len(block) > self.model.bytes:
            self.restart()
            raise RPGError(f"{self.name}: more arrived than the {self.model.bytes} bytes that were announced")
        left = memoryview(block)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise RPGError(f"{self.name}: cannot be written: {error.strerror}") from error
        self._digest.update(block)
        self.size += len(block)

    def sync(self) -> None:
        """Wait until the disk has what was written.

        Raises:
            RPGError: if it cannot be written.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RPGError(f"{self.name}: cannot be written: {error.strerror}") from error

    def restart(self) -> None:
        """Forget all that arrived."""
        self._file.seek(0)
        self._file.truncate()
        self._digest = hashlib.sha256()
        self.size = 0

    @property
    def is_right(self) -> bool:
        """Whether what arrived has the digest that was announced."""
        return self._digest.hexdigest() == self.model.sha256

    def check(self) -> None:
        """Check the digest of what arrived. Where it is wrong, all is forgotten: nothing can be trusted.

        Raises:
            RPGError: naming the digests.
        """
        if not self.is_right:
            found = self._digest.hexdigest()
            self.restart()
            raise RPGError(
                f"{self.name}: damaged on its way: expected SHA-256 {self.model.sha256}, got {found}"
            )


def in_memory(file: ModelFile | CompanionFile, name: str) -> tuple[PartialFile, io.BytesIO]:
    """A download into memory, which messages call `name`, and the buffer that holds its bytes."""
    buffer = io.BytesIO()
    return PartialFile(buffer, file, name), buffer


def model_path(directory: Path, model: ModelFile, form: DirectoryForm | None) -> Path:
    """Where a model goes: a directory, or without `form` a file."""
    return directory / (f"model_{model.index:06d}" + ("" if form else ".safetensors"))


def is_there(target: Path, model: ModelFile, form: DirectoryForm | None = None) -> bool:
    """Whether `target` is the model already: its file, or with `form` its directory.

    Raises:
        RPGError: if something else is there.
    """
    if not target.exists():
        return False
    weights = target / form.weights if form else target
    companions = form.companions if form else {}
    if (
        weights.is_file()
        and weights.stat().st_size == model.bytes
        and all(
            (target / name).is_file() and (target / name).read_bytes() == content
            for name, content in companions.items()
        )
        and sha256(weights) == model.sha256
    ):
        return True
    raise RPGError(f"{target}: something else than model {model.index} of this job is there already")


def partial_path(target: Path, model: ModelFile) -> Path:
    """Where a download lies until it is whole. The name tells the content, so that no other is continued."""
    return target.with_name(f".{target.name}.{model.sha256[:16]}.partial")


@contextmanager
def partial_file(target: Path, model: ModelFile, form: DirectoryForm | None = None) -> Iterator[PartialFile]:
    """The file that a model's weights are downloaded to; call `read_what_is_there` before anything else.

    It takes the name `target` when the block ends well, or with `form` becomes part of a directory that does.
    After an exception, what arrived stays for the next time.

    Raises:
        RPGError: if the file system refuses, another process is at the same file, or it is damaged.
    """
    path = partial_path(target, model)
    try:
        # Two processes that append to one file would harm it even after it was checked. The file has no
        # buffer, because Python would try again, when it closes the file, to write what it could not write.
        file = exclusive_lock(path)
    except LockedError as error:
        raise RPGError(f"{target}: another process is downloading it") from error
    except OSError as error:
        raise RPGError(f"{target}: cannot be written: {error.strerror}") from error
    with file:
        file.seek(0)
        arriving = PartialFile(file, model, str(target))
        try:
            yield arriving
            arriving.check()
            if form is None:
                path.replace(target)
            else:
                _make_directory(target, path, form)
        finally:
            if path.exists() and path.stat().st_size == 0:
                path.unlink(missing_ok=True)


def _make_directory(target: Path, weights: Path, form: DirectoryForm) -> None:
    """Move `weights` into a new directory `target`, which appears as a whole.

    Raises:
        RPGError: if the file system refuses.
    """
    try:
        directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        try:
            directory.chmod(0o755)
            for name, content in form.companions.items():
                (directory / name).write_bytes(content)
            weights.replace(directory / form.weights)
            directory.rename(target)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
    except OSError as error:
        raise RPGError(f"{target}: cannot be written: {error.strerror}") from error
