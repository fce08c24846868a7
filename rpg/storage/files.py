"""Files that are written as a whole or not at all, read as JSON, and hashed.

A local file is written beside its target and then renamed. An object behind a URI appears as a whole or not
at all: it is written to the local disk and then uploaded.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rpg.errors import RPGError, one_line
from rpg.storage.below import (
    MOST_JSON_BYTES,
    below,
    directory_path,
    held_directory,
    make_directory_below,
    open_regular,
    read_below,
    read_regular,
)
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath, is_remote

PARTIAL_SUFFIX = ".partial"
"""What the names of unfinished files and directories end with."""

_BLOCK_BYTES = 2**20
_LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127
_numbers = itertools.count()


class AtomicFile:
    """A file that takes the place of its target as a whole, by `commit`, or not at all, by `discard`.

    Several may have one target, even in one process: each has a temporary file of its own. Methods may be
    called from any thread, one at a time.

    Attributes:
        path: the target.
        temporary: the local path to write to. For a local target it lies beside the target and is named
            `.NAME.PID.NUMBER.partial`; for a URI it is in a directory of its own and has the target's name.
    """

    def __init__(self, path: AnyPath, synced: bool = True, root: AnyPath | None = None) -> None:
        """Prepare to write `path`, whose directory is made if it is missing.

        Args:
            path: the target.
            synced: whether `commit` waits until a local file is on the disk. Without it the machine may crash
                before that.
            root: a directory that the target lies below. Nothing outside of it is written then, whatever
                links others put there (`rpg.storage.below`).

        Raises:
            RPGError: naming `path`, if the directory cannot be made, or the link on the way to it.
        """
        self.path = path
        self.temporary: Path
        self._synced = synced
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._held = ExitStack()
        self._is_done = False
        try:
            if is_remote(path):
                self._directory = tempfile.TemporaryDirectory(prefix="rpg-", ignore_cleanup_errors=True)
                # Some formats are recognised by the suffix, so the name must be the target's.
                self.temporary = Path(self._directory.name) / path.name
            else:
                assert isinstance(path, Path)
                if root is None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                self._target = path if root is None else self._below(path, root)
                self.temporary = partial_path(self._target)
        except OSError as error:
            raise self.failure(error) from error

    def commit(self) -> None:
        """Put the temporary file in the place of the target: rename it, or upload it to a URI.

        Raises:
            RPGError: naming the target, if the temporary file is missing, or the file system or the storage
                refuses. The temporary file is removed, and an earlier target stays as it was.
        """
        try:
            if is_remote(self.path):
                if not self.temporary.is_file():
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                with storage_errors_for(self.path, "cannot be written"):
                    self.path.fs.put_file(str(self.temporary), self.path.path)
                return
            if self._synced:
                with self.temporary.open("rb") as file:
                    os.fsync(file.fileno())
            self.temporary.replace(self._target)
        except OSError as error:
            raise self.failure(error) from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temporary file, if there is one. The target stays as it is. May be called again."""
        if self._is_done:
            return
        self._is_done = True
        if self._directory is not None:
            self._directory.cleanup()
        else:
            # Removing the file also fails where it could not be made.
            with suppress(OSError):
                self.temporary.unlink()
        self._held.close()

    def _below(self, path: Path, root: AnyPath) -> Path:
        """The target by way of its directory, which stays open: no link can take that one's place."""
        assert isinstance(root, Path)
        parent = below(path.parent, root)
        try:
            directory = self._held.enter_context(held_directory(root, parent))
        except FileNotFoundError:
            make_directory_below(root, parent)
            directory = self._held.enter_context(held_directory(root, parent))
        return directory_path(directory, path.parent) / path.name

    def failure(self, error: OSError) -> RPGError:
        """The error to raise for `error`, which occurred while `temporary` was written."""
        place = "" if self._directory is None else f" (in {self._directory.name})"
        return RPGError(f"{self.path}: cannot be written: {error_reason(error)}{place}")


def partial_path(path: Path) -> Path:
    """Where a file or directory is written before it takes its place; another one at each call."""
    return path.parent / f".{path.name}.{os.getpid()}.{next(_numbers)}{PARTIAL_SUFFIX}"


@contextmanager
def replacing_file(path: AnyPath, synced: bool = True, root: AnyPath | None = None) -> Iterator[Path]:
    """Yield a local temporary path; when the block succeeds, its file takes the place of `path`.

    Args:
        path: the target, local or a URI.
        synced: whether a local file must be on the disk afterwards, even if the machine crashes.
        root: a directory that nothing is written outside of, as in `AtomicFile`.

    Raises:
        RPGError: naming `path`, if the file system or the storage refuses (full disk, file size limit,
            permissions), or the block writes no file. The temporary file is removed, and an earlier `path`
            stays as it was.
    """
    file = AtomicFile(path, synced, root)
    try:
        yield file.temporary
        file.commit()
    except OSError as error:
        raise file.failure(error) from error
    finally:
        file.discard()


def copy_file(source: Path, target: AnyPath) -> None:
    """Copy a local file to `target`, as a whole or not at all."""
    with replacing_file(target) as temporary:
        shutil.copyfile(source, temporary)


def write_text(path: AnyPath, text: str, root: AnyPath | None = None) -> None:
    """Write `text` to `path` as a whole or not at all, and with `root` nowhere outside of that."""
    with replacing_file(path, root=root) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: AnyPath, value: Any, root: AnyPath | None = None) -> None:
    """Write `value` as indented JSON to `path`, as a whole or not at all, and with `root` nowhere outside of
    that. NaN and Infinity are errors."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", root)


def read_json(
    path: AnyPath, what: str, *, root: AnyPath | None = None, most_bytes: int = MOST_JSON_BYTES
) -> Any:
    """Read JSON from a regular file.

    Args:
        path: of the file.
        what: names its role in error messages.
        root: a directory that the file lies below; then no link on the way is followed
            (`rpg.storage.below`). None: the user named the file, and it may be a link.
        most_bytes: a larger file is not read.

    Raises:
        RPGError: if the file is missing, unreadable, no regular file, too large or not JSON.
    """
    try:
        with storage_errors_for(path, f"cannot be read as {what}"):
            if root is None:
                content = read_regular(path, most_bytes)
            else:
                content = read_below(root, below(path, root), most_bytes)
        return json.loads(content.decode())
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found; expected {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RPGError(f"{path}: cannot be read as {what}: {error_reason(error)}") from error


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number that is finite as float64. A bool is no number."""
    # JSON's integers have no bounds, and math.isfinite fails on those beyond the floats.
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def is_float32(value: Any) -> bool:
    """Whether a value from JSON is a number that is finite as float32. A bool is no number."""
    return is_number(value) and abs(value) <= _LARGEST_FLOAT32


def is_storable(name: str) -> bool:
    """Whether a file may have this name, and a UTF-8 file say so: no NUL, no half of a surrogate pair."""
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def fits_file_systems(path: str) -> bool:
    """Whether a relative path is no longer than usual file systems take: 255 bytes a name, 4096 with all
    that stands before it."""
    return len(path.encode()) <= 2048 and all(len(name.encode()) <= 255 for name in path.split("/"))


def sha256(path: AnyPath) -> str:
    """Hexadecimal SHA-256 of a regular file's bytes."""
    with storage_errors_for(path), open_regular(path) as file:
        return sha256_of(file)


def sha256_of(file: IO[bytes]) -> str:
    """Hexadecimal SHA-256 of the bytes of an open file from where it is read next."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def error_reason(error: Exception) -> str:
    """What an error says went wrong, in one line; of an error of the operating system without its path."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)
