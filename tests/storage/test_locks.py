"""Exclusive locks: who gets them, how long they last, and what they leave alone."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rpg.storage.locations import location
from rpg.storage.locks import LockedError, exclusive_lock, lock_path

HOLDER = """
import sys, time
from pathlib import Path
from rpg.storage.locks import exclusive_lock
lock = exclusive_lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_lock_has_one_holder_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "new" / ".lock"
    with exclusive_lock(path), pytest.raises(LockedError, match="another process holds the lock"):
        exclusive_lock(path)
    exclusive_lock(path).close()


def test_a_lock_ends_with_the_process_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(LockedError):
            exclusive_lock(path, seconds=0.1)
    finally:
        holder.kill()
        holder.wait()
    exclusive_lock(path).close()


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    first = exclusive_lock(path)
    timer = threading.Timer(0.3, first.close)
    timer.start()
    start = time.monotonic()
    exclusive_lock(path, seconds=20).close()
    assert 0.2 < time.monotonic() - start < 10
    timer.join()


def test_the_content_of_a_locked_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "download.partial"
    path.write_bytes(b"half")
    with exclusive_lock(path) as file:
        file.seek(0)
        assert file.read() == b"half"
        file.write(b" more")
    assert path.read_bytes() == b"half more"


def test_a_directory_that_cannot_be_made_raises_the_systems_own_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError):
        exclusive_lock(tmp_path / "file" / ".lock")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_lock_of_a_uri_is_a_local_file(tmp_path: Path) -> None:
    assert lock_path(tmp_path / "run", tmp_path / "cache") == tmp_path / "run" / ".lock"
    first, second = (lock_path(location(f"memory://bucket/{name}"), tmp_path) for name in "ab")
    assert first.parent == second.parent == tmp_path
    assert first != second
