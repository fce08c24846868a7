"""Writing files so that nothing already written is harmed: beside the target first, then renamed.

Behind a URI there is no renaming, but an object appears whole or not at all: it is written to the local disk
first, then uploaded.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from upath import UPath

from rpg.errors import RPGError
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath, is_remote

_BLOCK_BYTES = 2**20
_PARTIAL = ".partial"
"""What the names of unfinished files and directories end with."""
_PREVIOUS = ".previous"
"""What the name of a directory ends with while another takes its place."""


@contextmanager
def replacing_file(path: AnyPath, synced: bool = True) -> Iterator[Path]:
    """Yield a local temporary path; on success its file takes the place of `path`.

    For a local `path` it lies beside it, is synced to disk and renamed; without `synced` the machine may die
    before it is on the disk. For a URI it is uploaded.

    Raises:
        RPGError: naming `path`, if the file system or the storage refuses (full disk, file size limit,
            permissions). The temporary file is removed and an earlier `path` stays as it was.
    """
    if is_remote(path):
        with _uploaded_file(path) as temporary:
            yield temporary
        return
    assert isinstance(path, Path)
    temporary = path.parent / f".{path.name}.{os.getpid()}{_PARTIAL}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if synced:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        # Where not even the temporary file could be made, removing it fails as well.
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def replacing_directory(path: AnyPath) -> Iterator[AnyPath]:
    """Yield a temporary directory beside `path`; on success it takes the place of `path` as a whole.

    What killed processes of this machine left of earlier attempts is tidied up first.

    Behind a URI there is no renaming a directory: `path` itself is yielded, and nothing is removed. Callers
    write the file that makes the directory complete last, and readers take only what that one names.

    Raises:
        RPGError: naming `path`, if the file system refuses. An earlier `path` stays as it was.
    """
    if is_remote(path):
        yield path
        return
    assert isinstance(path, Path)
    # A link stays, and what it points to is replaced.
    path = path.resolve()
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Tidying is a favour: where it is not allowed, writing may be all the same.
        with suppress(OSError):
            _tidy(path)
        temporary, lock = _temporary_directory(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        temporary.chmod(0o755)
        yield temporary
        # A worker was killed at it, and another has written the whole file. safetensors names its own .tmp…
        for leftover in [*temporary.rglob(f".*{_PARTIAL}"), *temporary.rglob(".tmp*")]:
            leftover.unlink()
        previous = temporary.with_suffix(_PREVIOUS)
        if path.exists():
            path.rename(previous)
        try:
            temporary.rename(path)
        except BaseException:
            if previous.exists():
                previous.rename(path)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def copy_file(source: Path, target: AnyPath) -> None:
    """Copy a local file to `target`, as a whole or not at all."""
    with replacing_file(target) as temporary:
        shutil.copyfile(source, temporary)


def remove_directory(path: AnyPath) -> None:
    """Remove a directory and all below it, as far as that is allowed."""
    if is_remote(path):
        with suppress(Exception):
            path.fs.rm(path.path, recursive=True)
    else:
        shutil.rmtree(str(path), ignore_errors=True)


def write_text(path: AnyPath, text: str) -> None:
    """Write `text` to `path` as a whole or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: AnyPath, value: Any) -> None:
    """Write `value` as indented JSON to `path`, as a whole or not at all. NaN and Infinity are errors."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: AnyPath, what: str) -> Any:
    """Read JSON from `path`; `what` names its role in error messages.

    Raises:
        RPGError: if the file is missing, unreadable or not JSON.
    """
    try:
        with storage_errors_for(path, f"cannot be read as {what}"):
            text = path.read_text(encoding="utf-8")
        return json.loads(text)
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found; expected {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise RPGError(f"{path}: cannot be read as {what}: {_reason(error)}") from error


def is_storable(name: str) -> bool:
    """Whether a file may have this name, and a UTF-8 file say so: no NUL, no half of a surrogate pair."""
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def sha256(path: AnyPath) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with storage_errors_for(path), path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        return digest.hexdigest()


@contextmanager
def _uploaded_file(path: UPath) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rpg-") as directory:
        # Under its own name, since formats go by the suffix.
        temporary = Path(directory) / path.name
        try:
            yield temporary
            if not temporary.is_file():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        except OSError as error:
            raise RPGError(f"{path}: cannot be written: {_reason(error)} (in {directory})") from error
        with storage_errors_for(path, "cannot be written"):
            path.fs.put_file(str(temporary), path.path)


def _prefix(path: Path) -> str:
    # Of this machine: where a file system is shared, its locks may be known to one machine alone.
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f".{path.name}.{host}."


def _temporary_directory(path: Path) -> tuple[Path, int]:
    """A new directory beside `path`, and a descriptor: as long as that is open, nobody tidies it away."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=_PARTIAL, dir=path.parent))
        lock = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if temporary.exists():
                return temporary, lock
        except BlockingIOError:
            pass
        except OSError:
            # Where there are no locks nobody else gets one either, and leaves the directory alone.
            return temporary, lock
        # Another process has taken it for a leftover before it was locked.
        os.close(lock)


def _tidy(path: Path) -> None:
    """Put `path` back if a process was killed between moving it away and its successor in, and remove what
    killed processes left; whatever a living one may still need is left alone."""
    known = re.compile(re.escape(_prefix(path)) + "[a-z0-9_]{8}")
    beside = [each for each in path.parent.iterdir() if each.name.startswith(f".{path.name}.")]
    moved = [each for each in beside if each.suffix == _PREVIOUS]
    for partial in (each for each in beside if each.suffix == _PARTIAL and known.fullmatch(each.stem)):
        with _if_abandoned(partial) as abandoned:
            previous = partial.with_suffix(_PREVIOUS)
            if not abandoned or (previous in moved and not path.exists() and len(moved) > 1):
                continue
            # Without the other it would be what was being removed, and not whole.
            if previous in moved and not path.exists():
                previous.rename(path)
            shutil.rmtree(partial, ignore_errors=True)
    for previous in (each for each in moved if known.fullmatch(each.stem)):
        if path.exists() and not previous.with_suffix(_PARTIAL).exists():
            shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def _if_abandoned(directory: Path) -> Iterator[bool]:
    """Whether no process holds a directory; nobody else takes it for that meanwhile."""
    try:
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(lock)


def _cannot_write(path: AnyPath, error: OSError) -> RPGError:
    return RPGError(f"{path}: cannot be written: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
