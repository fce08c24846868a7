"""Files below a directory that others can write to: nothing that lies there leads out of it or holds up.

Everything that reads, lists, makes or removes below a root goes through here. A name is opened part by part,
each relative to the descriptor of the directory before it, and links are not followed. So neither a link, nor
a directory that is exchanged for a link meanwhile, leads out. Only regular files are opened, and only so many
bytes of them are read: a FIFO would wait for a writer, a device would never end.

The root itself is what a user named, and may be a link. Behind a URI there are no links and no devices.
"""

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from rpg.errors import RPGError
from rpg.storage.locations import AnyPath, fetched, is_remote

MOST_JSON_BYTES = 2**26
"""Of a file that is read as JSON, unless its kind is known to be larger. Parsed, it may take twenty times as
much memory."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_LINK_ERRORS = (errno.ELOOP, errno.EMLINK, errno.ENOTDIR)
"""What systems answer with where a link stands in the place of a file or directory that must be none."""


class NotOrdinaryError(RPGError):
    """Something lies where a regular file or a directory is expected: a link, a FIFO, a device."""


class TooLargeError(RPGError):
    """A file is larger than what is read of its kind."""


class Listed(NamedTuple):
    """What lies in a directory under a name."""

    is_directory: bool
    size: int | None
    """Bytes of a regular file; None for anything else, such as a directory or a link."""


def open_below(root: AnyPath, name: str) -> IO[bytes]:
    """Open the regular file `name` below `root` for reading.

    Raises:
        NotOrdinaryError: naming what is no regular file, or the link on the way to it.
        OSError: if there is no such file, or it may not be read; behind a URI, whatever its storage raises.
    """
    path = root / name
    if is_remote(path):
        opened: IO[bytes] = path.open("rb")
        return opened
    assert isinstance(root, Path)
    parent, last = _split(name)
    with held_directory(root, parent) as directory:
        descriptor = _opened(last, _FILE | os.O_NOFOLLOW, root / name, directory)
    return _regular(descriptor, root / name)


def open_regular(path: AnyPath) -> IO[bytes]:
    """Open a regular file that a user named, or a link to one, for reading.

    Raises:
        NotOrdinaryError: naming what is no regular file.
        OSError: if there is no such file, or it may not be read; behind a URI, whatever its storage raises.
    """
    if is_remote(path):
        opened: IO[bytes] = path.open("rb")
        return opened
    assert isinstance(path, Path)
    # With O_NONBLOCK a FIFO is opened at once, and then refused.
    return _regular(os.open(path, _FILE), path)


def read_below(root: AnyPath, name: str, most_bytes: int = MOST_JSON_BYTES) -> bytes:
    """The bytes of the regular file `name` below `root`, which may be at most `most_bytes`.

    Raises:
        TooLargeError: naming the file that has more.
        NotOrdinaryError, OSError: as `open_below`.
    """
    with open_below(root, name) as file:
        return _at_most(file, root / name, most_bytes)


def read_regular(path: AnyPath, most_bytes: int = MOST_JSON_BYTES) -> bytes:
    """The bytes of a regular file that a user named, or of a link to one, which may be at most `most_bytes`.

    Raises:
        TooLargeError: naming the file that has more.
        NotOrdinaryError, OSError: as `open_regular`.
    """
    with open_regular(path) as file:
        return _at_most(file, path, most_bytes)


@contextmanager
def path_below(root: AnyPath, name: str) -> Iterator[Path]:
    """Yield a path to the regular file `name` below `root`, for packages that open paths alone.

    It leads to the file that was opened, whatever lies under its name by now, and only in the block. A file
    behind a URI is copied. In the message of an `RPGError` that is raised in the block, the file's own path
    takes its place.

    Raises:
        NotOrdinaryError, OSError: as `open_below`.
    """
    if is_remote(root):
        with fetched(root / name) as local:
            yield local
        return
    with open_below(root, name) as file:
        path = Path(f"/dev/fd/{file.fileno()}")
        try:
            yield path
        except RPGError as error:
            raise RPGError(str(error).replace(str(path), str(root / name))) from error


def list_below(root: AnyPath, name: str = "") -> dict[str, Listed]:
    """What lies in the directory `name` below `root`, by name; nothing where there is no such directory.

    Raises:
        NotOrdinaryError: naming the link, or what is no directory.
        OSError: if the directory may not be read; behind a URI, whatever its storage raises.
    """
    path = root / name if name else root
    if is_remote(path):
        base = path.fs._strip_protocol(path.path).rstrip("/")
        try:
            found = path.fs.ls(base, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {
            PurePosixPath(each["name"]).name: Listed(
                each["type"] == "directory", int(each["size"] or 0) if each["type"] == "file" else None
            )
            for each in found
            # Object stores represent directories as empty objects of the directory's own name.
            if each["name"].rstrip("/") != base
        }
    assert isinstance(root, Path)
    listed = {}
    try:
        with held_directory(root, name) as directory, os.scandir(directory) as entries:
            for entry in entries:
                # What is removed meanwhile is not there.
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    size = status.st_size if stat.S_ISREG(status.st_mode) else None
                    listed[entry.name] = Listed(stat.S_ISDIR(status.st_mode), size)
    except FileNotFoundError:
        return {}
    return listed


def check_ordinary_below(root: AnyPath, name: str) -> None:
    """Check that nothing but regular files and directories lies in the directory `name` below `root`.

    There need be no such directory.

    Raises:
        NotOrdinaryError: naming the link, or what else it is.
        OSError: if the directory may not be read; behind a URI, whatever its storage raises.
    """
    for each, listed in list_below(root, name).items():
        if not listed.is_directory and listed.size is None:
            open_below(root, f"{name}/{each}").close()


def below(path: AnyPath, root: AnyPath) -> str:
    """The name of `path` below `root`, as the functions here take it."""
    return str(path)[len(str(root).rstrip("/")) :].lstrip("/")


def directory_path(descriptor: int, path: Path) -> Path:
    """A path that leads to an open directory, whatever lies under its own `path` by now.

    Where a system has no such paths, it is `path` itself, which was right when the directory was opened.
    """
    by_descriptor = Path(f"/proc/self/fd/{descriptor}")
    return by_descriptor if by_descriptor.exists() else path


def make_directory_below(root: AnyPath, name: str) -> None:
    """Make the directory `name` below `root`, and all on the way to it, where they are missing.

    Behind a URI nothing is made, since files need no directories there.

    Raises:
        NotOrdinaryError: naming the link on the way, or what is no directory.
        OSError: if the file system refuses.
    """
    if not isinstance(root, Path):
        return
    root.mkdir(parents=True, exist_ok=True)
    done = PurePosixPath()
    for part in PurePosixPath(name).parts:
        with held_directory(root, str(done)) as directory, suppress(FileExistsError):
            os.mkdir(part, dir_fd=directory)
        done /= part
    with held_directory(root, name):
        return


def rename_below(root: AnyPath, name: str, new_name: str) -> None:
    """Give the file `name` below `root` another name in its directory.

    Raises:
        NotOrdinaryError: naming the link on the way.
        OSError: if the file system refuses; behind a URI, whatever its storage raises.
    """
    path = root / name
    if is_remote(path):
        path.rename(str(path.parent / new_name))
        return
    assert isinstance(root, Path)
    parent, last = _split(name)
    with held_directory(root, parent) as directory:
        os.rename(last, new_name, src_dir_fd=directory, dst_dir_fd=directory)


def remove_below(root: AnyPath, name: str) -> None:
    """Remove what lies under `name` below `root`: a file, a link itself, or a directory with all in it.

    Raises:
        NotOrdinaryError: naming the link on the way.
        OSError: if the file system refuses; behind a URI, whatever its storage raises.
    """
    path = root / name
    if is_remote(path):
        path.fs.rm(path.path, recursive=True)
        return
    assert isinstance(root, Path)
    parent, last = _split(name)
    with held_directory(root, parent) as directory:
        if stat.S_ISDIR(os.lstat(last, dir_fd=directory).st_mode):
            # It works by descriptors too, and does not follow links.
            shutil.rmtree(last, dir_fd=directory)
        else:
            os.unlink(last, dir_fd=directory)


@contextmanager
def held_directory(root: Path, name: str = "") -> Iterator[int]:
    """Yield a descriptor of the directory `name` below `root`, to open and make files relative to.

    Raises:
        NotOrdinaryError: naming the link on the way, or what is no directory.
        OSError: if there is no such directory, or it may not be read.
    """
    path = root
    descriptor = os.open(root, _DIRECTORY)
    try:
        for part in PurePosixPath(name).parts:
            if part in ("..", "/"):
                raise NotOrdinaryError(f"{root}: '{name}' leads out of it")
            path /= part
            inner = _opened(part, _DIRECTORY | os.O_NOFOLLOW, path, descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _opened(name: str, flags: int, path: Path, directory: int) -> int:
    try:
        return os.open(name, flags, dir_fd=directory)
    except OSError as error:
        # A socket cannot be opened at all.
        if error.errno in _LINK_ERRORS or error.errno == errno.ENXIO:
            expected = "directory" if flags & os.O_DIRECTORY else "regular file"
            raise NotOrdinaryError(f"{path}: is {_kind(name, directory)}; expected a {expected}") from error
        # The error names the last part of the path alone.
        raise OSError(error.errno, error.strerror, str(path)) from error


def _kind(name: str, directory: int) -> str:
    with suppress(OSError):
        mode = os.lstat(name, dir_fd=directory).st_mode
        for is_kind, kind in _KINDS:
            if is_kind(mode):
                return kind
    return "something else"


def _regular(descriptor: int, path: AnyPath) -> IO[bytes]:
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "something else")
        raise NotOrdinaryError(f"{path}: is {kind}; expected a regular file")
    return os.fdopen(descriptor, "rb")


_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def _at_most(file: IO[bytes], path: AnyPath, most_bytes: int) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    # The file may grow while it is read.
    content = b"" if size > most_bytes else file.read(most_bytes + 1)
    if max(size, len(content)) > most_bytes:
        raise TooLargeError(f"{path}: has more than {most_bytes:,} bytes; expected at most so many")
    return content


def _split(name: str) -> tuple[str, str]:
    path = PurePosixPath(name)
    if not path.name or path.name == "..":
        raise NotOrdinaryError(f"'{name}': expected the name of a file below a directory")
    return ("" if path.parent == PurePosixPath() else str(path.parent)), path.name
