"""Exclusive locks on files: one job writes an output, one service a storage, one process a download.

The system lets go of a lock when its process ends, however it ends.
"""

import hashlib
import os
import stat
import time
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from rpg.errors import RPGError
from rpg.storage.locations import AnyPath

LOCK_FILE = ".lock"

_POLL_SECONDS = 0.2


class LockedError(RPGError):
    """Another process holds the lock."""


def lock_path(directory: AnyPath, cache: Path) -> Path:
    """The file whose lock stands for `directory`.

    Object stores have no locks. For a URI the file lies in the local directory `cache`, so its lock keeps
    apart the processes of one machine, and those of two machines do not see each other.
    """
    path = directory / LOCK_FILE
    if isinstance(path, Path):
        return path
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:32]
    return cache.expanduser().absolute() / f"{name}.lock"


def exclusive_lock(path: Path, seconds: float = 0.0) -> IO[bytes]:
    """Lock the file at `path`, waiting for it `seconds` at most; the lock lasts until the file is closed.

    The file and its directory are made where they are missing; what the file holds stays as it is. It is open
    for reading and appending, without a buffer.

    Raises:
        LockedError: if another process holds the lock for longer.
        RPGError: naming the path, if a link or anything but a regular file lies there.
        OSError: if the file cannot be opened for writing, or the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_lock(path)
    deadline = time.monotonic() + seconds
    try:
        while not lock_descriptor(file.fileno(), blocking=False):
            if time.monotonic() >= deadline:
                raise LockedError(f"{path}: another process holds the lock")
            time.sleep(_POLL_SECONDS)
    except BaseException:
        file.close()
        raise
    return file


def open_lock(path: Path) -> IO[bytes]:
    """Open a lock's file, which is made if it is missing and otherwise left as it is.

    Raises:
        RPGError: naming the path, if a link or anything but a regular file lies there.
        OSError: if the file cannot be opened for writing.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise RPGError(f"{path}: is a link; expected a lock's regular file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RPGError(f"{path}: is no regular file; expected a lock's")
    return os.fdopen(descriptor, "a+b", buffering=0)
