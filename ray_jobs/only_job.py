"""One job at a time on one output directory."""

import fcntl
import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rpg.errors import RPGError
from rpg.storage.files import write_text
from rpg.storage.locations import AnyPath, is_remote

LOCK_FILE = ".lock"


@contextmanager
def only_job(output: AnyPath, cache: Path) -> Iterator[None]:
    """Hold the lock of a run's directory; the system lets go of it when the process ends, however it ends.

    Object stores have no locks. For a URI the lock is a file in `cache`, so it keeps apart the jobs of one
    machine, not those of two. The object `.lock` in the output says who came last: writing it shows, before
    any work is done, that the output can be written.

    Raises:
        RPGError: if another job holds it, or the output cannot be written.
    """
    path = output / LOCK_FILE
    if is_remote(output):
        name = hashlib.sha256(str(output).encode()).hexdigest()[:32]
        path = cache.expanduser().absolute() / "jobs" / f"{name}.lock"
    assert isinstance(path, Path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise RPGError(f"{path.parent}: cannot be an output directory: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RPGError(f"{output}: another job is writing here; choose another output") from error
        if is_remote(output):
            write_text(output / LOCK_FILE, f"{socket.gethostname()} {os.getpid()}\n")
        yield
