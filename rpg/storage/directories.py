"""Directories that are replaced as a whole: written beside the target first, then renamed."""

import errno
import fcntl
import hashlib
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rpg.errors import RPGError
from rpg.storage.below import below, list_below, remove_below
from rpg.storage.files import PARTIAL_SUFFIX, error_reason
from rpg.storage.locations import AnyPath, is_remote

_PREVIOUS_SUFFIX = ".previous"
"""What the name of a directory ends with while another takes its place."""


@contextmanager
def replacing_directory(path: AnyPath) -> Iterator[AnyPath]:
    """Yield a temporary directory beside `path`; when the block succeeds, it takes the place of `path`.

    Directories that killed processes of this machine left behind are removed first.

    Storage behind a URI cannot rename a directory: `path` itself is yielded, and nothing is removed. Callers
    write the file that makes the directory complete last, and readers read only the files that it names.

    Raises:
        RPGError: naming `path`, if the file system refuses. An earlier `path` stays as it was.
    """
    if is_remote(path):
        yield path
        return
    assert isinstance(path, Path)
    # If `path` is a link, the directory that it points to is replaced, and the link stays.
    path = path.resolve()
    try:
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        # The new directory can often be written where the old ones may not be removed.
        with suppress(OSError):
            _tidy(path)
        temporary, lock = _temporary_directory(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        temporary.chmod(0o755)
        yield temporary
        # If a worker was killed while it wrote a file, another has written it again, but the unfinished one
        # is still there. safetensors names its temporary files `.tmp…`.
        for leftover in [*temporary.rglob(f".*{PARTIAL_SUFFIX}"), *temporary.rglob(".tmp*")]:
            with suppress(FileNotFoundError):
                remove_below(temporary, below(leftover, temporary))
        previous = temporary.with_suffix(_PREVIOUS_SUFFIX)
        if path.exists():
            path.rename(previous)
        try:
            temporary.rename(path)
        except BaseException:
            if previous.exists():
                previous.rename(path)
            raise
        _remove(previous)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        _remove(temporary)
        os.close(lock)


def remove_directory(path: AnyPath) -> None:
    """Remove a directory and all below it, as far as that is allowed. Of a link, the link is removed."""
    # A storage's package may raise anything.
    with suppress(Exception):
        remove_below(path.parent, path.name)


def _remove(path: Path) -> None:
    """Remove a directory and all below it, as far as that is allowed."""
    with suppress(OSError, RPGError):
        remove_below(path.parent, path.name)


def _prefix(path: Path) -> str:
    # The name tells the machine, because on a shared file system other machines may not see its locks.
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f".{path.name}.{host}."


def _temporary_directory(path: Path) -> tuple[Path, int]:
    """A new directory beside `path`, and a descriptor that locks it: while it is open, nobody removes it."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=PARTIAL_SUFFIX, dir=path.parent))
        lock = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if temporary.exists():
                return temporary, lock
        except BlockingIOError:
            pass
        except OSError:
            # The file system has no locks: others cannot lock the directory either, so they do not remove it.
            return temporary, lock
        # Another process took it for abandoned before it was locked.
        os.close(lock)


def _tidy(path: Path) -> None:
    """Repair and remove what killed processes left beside `path`.

    If one was killed after it had moved `path` away and before it put the new directory there, the old one is
    moved back. Whatever a living process may still need stays.
    """
    known = re.compile(re.escape(_prefix(path)) + "[a-z0-9_]{8}")
    # A link is none of what `replacing_directory` leaves: whoever put it there would have it take the place
    # of `path`.
    beside = [
        path.parent / name
        for name, each in list_below(path.parent).items()
        if name.startswith(f".{path.name}.") and each.is_directory
    ]
    moved = [each for each in beside if each.suffix == _PREVIOUS_SUFFIX]
    for partial in (each for each in beside if each.suffix == PARTIAL_SUFFIX and known.fullmatch(each.stem)):
        with _if_abandoned(partial) as abandoned:
            previous = partial.with_suffix(_PREVIOUS_SUFFIX)
            if not abandoned or (previous in moved and not path.exists() and len(moved) > 1):
                continue
            # Only a directory whose successor is unfinished is whole: another may be half removed.
            if previous in moved and not path.exists():
                previous.rename(path)
            _remove(partial)
    for previous in (each for each in moved if known.fullmatch(each.stem)):
        if path.exists() and not previous.with_suffix(PARTIAL_SUFFIX).exists():
            _remove(previous)


@contextmanager
def _if_abandoned(directory: Path) -> Iterator[bool]:
    """Yield whether no process holds a directory's lock; if so, the block holds it."""
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


def _cannot_write(path: Path, error: OSError) -> RPGError:
    return RPGError(f"{path}: cannot be written: {error_reason(error)}")
