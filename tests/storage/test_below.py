"""Below a root nothing leads out of it and nothing holds up: files, directories, locks, what was left."""

import errno
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rpg.errors import RPGError
from rpg.storage import below
from rpg.storage.below import (
    Listed,
    NotOrdinaryError,
    TooLargeError,
    list_below,
    make_directory_below,
    open_below,
    path_below,
    read_below,
    read_regular,
    remove_below,
    rename_below,
)
from rpg.storage.directories import remove_directory, replacing_directory
from rpg.storage.files import AtomicFile, read_json, write_json
from rpg.storage.locks import exclusive_lock

OUTSIDE = {"kept.txt": b"kept", "below/kept.bin": b"kept too"}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    for name, content in OUTSIDE.items():
        (tmp_path / "outside" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "outside" / name).write_bytes(content)
    return tmp_path / "outside"


@pytest.fixture
def root(tmp_path: Path, outside: Path) -> Path:
    """A root with a file, a link to a file outside, one to a directory outside, and a FIFO."""
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_bytes(b"content")
    (root / "a" / "link").symlink_to(outside / "kept.txt")
    (root / "a" / "away").symlink_to(outside)
    os.mkfifo(root / "a" / "fifo")
    return root


def unchanged(outside: Path) -> bool:
    found = {str(p.relative_to(outside)): p.read_bytes() for p in outside.rglob("*") if p.is_file()}
    return found == OUTSIDE


REFUSED = {
    "a/link": "a/link: is a link; expected a regular file",
    "a/away": "a/away: is a link; expected a regular file",
    "a/away/kept.txt": "a/away: is a link; expected a directory",
    "a/away/below/kept.bin": "a/away: is a link; expected a directory",
    "a/fifo": "a/fifo: is a FIFO; expected a regular file",
    "a/b/file/x": "a/b/file: is a file; expected a directory",
    "../outside/kept.txt": "'../outside' leads out of it",
    "a/../../outside/kept.txt": "leads out of it",
    "..": "expected the name of a file below a directory",
    "": "expected the name of a file below a directory",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_leads_out_is_not_opened(root: Path, outside: Path, name: str) -> None:
    actions: list[Callable[[], object]] = [
        lambda: open_below(root, name),
        lambda: read_below(root, name),
        lambda: path_below(root, name).__enter__(),
    ]
    for action in actions:
        with pytest.raises(NotOrdinaryError, match=re.escape(REFUSED[name]) + "$"):
            action()
    assert unchanged(outside)


def test_what_is_there_is_read_listed_renamed_and_removed(root: Path, outside: Path) -> None:
    assert read_below(root, "a/b/file") == b"content"
    with path_below(root, "a/b/file") as path:
        assert path.read_bytes() == b"content"
    assert list_below(root, "a") == {
        "b": Listed(True, None),
        "link": Listed(False, None),
        "away": Listed(False, None),
        "fifo": Listed(False, None),
    }
    assert list_below(root, "a/b") == {"file": Listed(False, 7)}
    assert list_below(root, "nothing") == {}
    rename_below(root, "a/b/file", "other")
    make_directory_below(root, "c/d/e")
    assert (root / "a" / "b" / "other").read_bytes() == b"content" and (root / "c" / "d" / "e").is_dir()
    for name in ("a/link", "a/away"):
        remove_below(root, name)
    assert unchanged(outside)
    (root / "a" / "b" / "away").symlink_to(outside)
    remove_below(root, "a")
    assert unchanged(outside) and not (root / "a").exists()


@pytest.mark.parametrize("action", [remove_below, list_below, make_directory_below])
def test_nothing_is_done_beyond_a_link(
    root: Path, outside: Path, action: Callable[[Path, str], object]
) -> None:
    with pytest.raises(NotOrdinaryError, match=r"a/away: is a link; expected a directory$"):
        action(root, "a/away/below")
    with pytest.raises(NotOrdinaryError):
        rename_below(root, "a/away/kept.txt", "taken.txt")
    assert unchanged(outside)


def test_the_root_itself_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "also").symlink_to(root)
    assert read_below(tmp_path / "also", "a/b/file") == b"content"


def test_a_directory_that_is_exchanged_for_a_link_meanwhile_leads_nowhere(root: Path, outside: Path) -> None:
    """Thousands of exchanges while files are opened and removed: what lies outside is never reached."""
    real, spare, name = root / "a" / "b", root / "a" / "spare", "a/b/kept.txt"
    stop = threading.Event()

    def exchange() -> None:
        while not stop.is_set():
            real.rename(spare)
            real.symlink_to(outside)
            real.unlink()
            spare.rename(real)

    thread = threading.Thread(target=exchange)
    thread.start()
    try:
        refused = 0
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            for action in (open_below, remove_below):
                with pytest.raises((NotOrdinaryError, FileNotFoundError)) as caught:
                    action(root, name)
                refused += caught.type is NotOrdinaryError
    finally:
        stop.set()
        thread.join()
    assert refused, "the link was met"
    assert unchanged(outside)


def test_a_file_is_written_where_its_directory_was(root: Path, outside: Path) -> None:
    """The directory is held: what takes its name before the file takes its place changes nothing."""
    file = AtomicFile(root / "a" / "b" / "new", root=root)
    file.temporary.write_bytes(b"new")
    (root / "a" / "b").rename(root / "a" / "moved")
    (root / "a" / "b").symlink_to(outside)
    file.commit()
    assert unchanged(outside)
    assert (root / "a" / "moved" / "new").read_bytes() == b"new"
    with pytest.raises(RPGError, match=r"a/b: is a link; expected a directory$"):
        write_json(root / "a" / "b" / "new", 1, root)
    assert unchanged(outside)


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    start = time.monotonic()
    for read in (lambda: read_below(tmp_path, "large"), lambda: read_regular(tmp_path / "large")):
        with pytest.raises(TooLargeError, match=r"large: has more than 67,108,864 bytes"):
            read()
    with pytest.raises(RPGError, match="has more than"):
        read_json(tmp_path / "large", "a record")
    assert time.monotonic() - start < 5
    (tmp_path / "fits").write_bytes(b"1234")
    assert read_below(tmp_path, "fits", 4) == b"1234"
    with pytest.raises(TooLargeError):
        read_below(tmp_path, "fits", 3)


def test_a_users_own_file_may_be_a_link_to_a_file_and_to_nothing_else(root: Path) -> None:
    assert read_regular(root / "a" / "link") == b"kept"
    with pytest.raises(NotOrdinaryError, match="is a FIFO"):
        read_json(root / "a" / "fifo", "a record")
    with pytest.raises(IsADirectoryError):
        read_regular(root / "a" / "away")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(root / "a" / "s"))
    with server, pytest.raises((NotOrdinaryError, OSError)):
        read_regular(root / "a" / "s")
    with pytest.raises(NotOrdinaryError, match="is a socket"):
        open_below(root, "a/s")


def test_a_lock_is_no_link(tmp_path: Path, outside: Path) -> None:
    for target in (outside / "kept.txt", outside / "new"):
        (tmp_path / ".lock").symlink_to(target)
        with pytest.raises(RPGError, match=r"\.lock: is a link; expected a lock's regular file$"):
            exclusive_lock(tmp_path / ".lock")
        (tmp_path / ".lock").unlink()
    os.mkfifo(tmp_path / ".lock")
    with pytest.raises((RPGError, OSError)):
        exclusive_lock(tmp_path / ".lock")
    assert unchanged(outside)


def test_a_link_beside_a_directory_does_not_take_its_place(tmp_path: Path, outside: Path) -> None:
    """What looks like the predecessor that a killed process moved away, and is a link."""
    target = tmp_path / "generator"
    with replacing_directory(target) as temporary:
        (temporary / "file").write_bytes(b"1")
        prefix = re.sub(r"[a-z0-9_]{8}\.partial$", "", temporary.name)
    target.rename(tmp_path / "moved by hand")
    (tmp_path / f"{prefix}abcdefgh.partial").mkdir()
    (tmp_path / f"{prefix}abcdefgh.previous").symlink_to(outside)
    with pytest.raises(ValueError, match="stop"), replacing_directory(target) as temporary:
        (temporary / "link").symlink_to(outside)
        (temporary / ".x.partial").symlink_to(outside)
        raise ValueError("stop")
    assert not target.exists(), "the link is no earlier directory"
    assert unchanged(outside)
    with replacing_directory(target) as temporary:
        (temporary / ".x.partial").symlink_to(outside)
        (temporary / "file").write_bytes(b"2")
    assert sorted(path.name for path in target.iterdir()) == ["file"]
    assert unchanged(outside)


def test_removing_a_directory_that_is_a_link_removes_the_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "link").symlink_to(outside)
    remove_directory(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert unchanged(outside)


def test_errors_of_the_file_system_stay_what_they_are(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_below(root, "a/nothing")
    opened = os.open

    def failing(name: object, *arguments: int, **options: int) -> int:
        if name == "file":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(name, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(below.os, "open", failing)
    with pytest.raises(OSError, match="a/b/file") as caught:
        open_below(root, "a/b/file")
    assert caught.value.errno == errno.EIO
