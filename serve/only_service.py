"""One service at a time on one storage: two dispatchers would not know of each other's jobs."""

import fcntl
import hashlib
import time
from pathlib import Path
from typing import IO

from rpg.errors import RPGError
from rpg.storage.locations import AnyPath

_LOCK = ".lock"


def only_service(storage: AnyPath, cache: Path, seconds: float = 20.0) -> IO[str]:
    """Take the storage's lock; it lasts until the file that is returned is closed, or the process ends.

    Waits a little, since a process that was killed may take its time to end. Object stores have no locks:
    for a URI the lock is a file in `cache`, and keeps apart the services of one machine alone.

    Raises:
        RPGError: if another service holds it, or the storage cannot be written.
    """
    path = storage / _LOCK
    if not isinstance(path, Path):
        name = hashlib.sha256(str(storage).encode()).hexdigest()[:32]
        path = cache.expanduser().absolute() / "services" / f"{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise RPGError(f"storage: {storage} cannot be written: {error.strerror}") from error
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                file.close()
                raise RPGError(f"storage: another service is running on {storage}") from error
            time.sleep(0.2)
