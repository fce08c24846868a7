"""Downloading a model's file: it is hashed while it arrives, and kept only if its digest is the right one."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rpg.client.schema import ModelFile
from rpg.errors import RPGError
from rpg.storage.files import sha256
from rpg.storage.locks import LockedError, exclusive_lock

_BLOCK = 2**20


class PartialFile:
    """The bytes of `model` that have arrived, in a binary file that can be read, written and cut."""

    def __init__(self, file: IO[bytes], model: ModelFile, name: str) -> None:
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


def in_memory(model: ModelFile) -> tuple[PartialFile, io.BytesIO]:
    """A download into memory, and the buffer that holds its bytes."""
    buffer = io.BytesIO()
    return PartialFile(buffer, model, "the model"), buffer


def is_there(target: Path, model: ModelFile) -> bool:
    """Whether `target` is the model's file already.

    Raises:
        RPGError: if something else is there.
    """
    if not target.exists():
        return False
    if target.is_file() and target.stat().st_size == model.bytes and sha256(target) == model.sha256:
        return True
    raise RPGError(f"{target}: something else than model {model.index} of this job is there already")


def partial_path(target: Path, model: ModelFile) -> Path:
    """Where a download lies until it is whole. The name tells the content, so that no other is continued."""
    return target.with_name(f".{target.name}.{model.sha256[:16]}.partial")


@contextmanager
def partial_file(target: Path, model: ModelFile) -> Iterator[PartialFile]:
    """The file that `target` is downloaded to; call `read_what_is_there` before anything else.

    It takes its name when the block ends well. After an exception, what arrived stays for the next time.

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
            path.replace(target)
        finally:
            if path.exists() and path.stat().st_size == 0:
                path.unlink(missing_ok=True)
