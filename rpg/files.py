"""Writing files so that nothing already written is harmed: beside the target first, then renamed.

Behind a URI there is no renaming, but an object appears whole or not at all: it is written to the local disk
first, then uploaded.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from upath import UPath

from rpg.errors import RPGError
from rpg.storage import AnyPath, is_remote
from rpg.storage_errors import naming

__all__ = [
    "AnyPath",
    "copy_file",
    "is_storable",
    "read_json",
    "remove_directory",
    "replacing_directory",
    "replacing_file",
    "sha256",
    "write_json",
    "write_text",
]

_BLOCK_BYTES = 2**20
_PARTIAL = ".partial"
"""What the names of unfinished files and directories end with."""


@contextmanager
def replacing_file(path: AnyPath) -> Iterator[Path]:
    """Yield a local temporary path; on success its file takes the place of `path`.

    For a local `path` it lies beside it, is synced to disk and renamed. For a URI it is uploaded.

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
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PARTIAL, dir=path.parent))
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        temporary.chmod(0o755)
        yield temporary
        # A worker was killed at it, and another has written the whole file. safetensors names its own .tmp…
        for leftover in [*temporary.rglob(f".*{_PARTIAL}"), *temporary.rglob(".tmp*")]:
            leftover.unlink()
        previous = temporary.with_suffix(".previous")
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
        with naming(path, f"cannot be read as {what}"):
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
    with naming(path), path.open("rb") as file:
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
        with naming(path, "cannot be written"):
            path.fs.put_file(str(temporary), path.path)


def _cannot_write(path: AnyPath, error: OSError) -> RPGError:
    return RPGError(f"{path}: cannot be written: {_reason(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
