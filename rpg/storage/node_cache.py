"""A node's cache of remote files and directories: downloaded once, then used by every process of the node.

    CACHE/KEY/content/NAME   the copy; KEY is a digest of the URI and of every file's size and version
    CACHE/KEY/source.json    the URI and the files' versions; its modification time is that of the last use
    CACHE/KEY.partial/       an unfinished download; its file `reserved` has the number of bytes it will take
    CACHE/KEY.lock           held shared by processes that use KEY, exclusively by one that fetches or evicts
    CACHE/room.lock          held by the process that makes room for a download

Locks are `flock`s, which the system releases when a process ends, even if it is killed.
"""

import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from upath import UPath

from rpg.errors import RPGError
from rpg.storage.below import held_directory, list_below, open_below, read_below, remove_below
from rpg.storage.download import DamagedError, RemoteFile, download, remote_files
from rpg.storage.errors import storage_errors_for
from rpg.storage.locks import open_lock

_CONTENT = "content"
_SOURCE = "source.json"
_RESERVED = "reserved"
_PARTIAL = ".partial"
_KEY = "[0-9a-f]{32}"
_ATTEMPTS = 3

# Locks of the entries that this process uses. They are held until it ends, because nothing tells when a
# mapped file is no longer used.
_in_use: dict[Path, IO[bytes]] = {}


def local_copy(
    path: Path | UPath, cache: Path, limit_bytes: int, check: Callable[[Path], object] | None = None
) -> Path:
    """A local path with the content of `path`: itself, or a copy in this node's cache.

    The first process of the node that asks for a remote file or directory downloads it. It is downloaded
    again when it has changed; of a directory only the changed files. To keep `limit_bytes`, the entries that
    were used longest ago are evicted, except those that a living process has asked for. The copy must not be
    written to.

    Args:
        path: file or directory.
        cache: directory on a local file system; it is made if it is missing.
        limit_bytes: the most bytes that the cache may hold.
        check: called with a fresh copy before any process may use it; if it raises an `RPGError`, the copy is
            downloaded once more.

    Raises:
        RPGError: naming the URI, if it cannot be read, arrives damaged or does not fit; naming the cache, if
            it cannot be written.
    """
    if isinstance(path, Path):
        return path
    cache = cache.expanduser().absolute()
    for _ in range(_ATTEMPTS):
        with storage_errors_for(path):
            files = remote_files(path)
        entry = cache / _key(path, files)
        copy = entry / _CONTENT / path.name
        try:
            cache.mkdir(parents=True, exist_ok=True)
            if _used(entry):
                return copy
            with _locked(entry, fcntl.LOCK_EX):
                if _source(entry) is None:
                    _remove(entry)
                    _bring(path, files, entry, limit_bytes, check)
        except OSError as error:
            raise RPGError(f"{cache}: cannot hold a copy of {path}: {error.strerror}") from error
        # The remote file may have changed during the download, or the entry may have been evicted since.
        with storage_errors_for(path):
            unchanged = remote_files(path) == files
        if unchanged and _used(entry):
            return copy
    raise RPGError(f"{path}: changes faster than it can be brought to {cache}")


def _key(path: UPath, files: Mapping[str, RemoteFile]) -> str:
    return hashlib.sha256(json.dumps([str(path), _versions(files)]).encode()).hexdigest()[:32]


def _versions(files: Mapping[str, RemoteFile]) -> dict[str, tuple[int, str]]:
    return {name: (file.size, file.version) for name, file in files.items()}


def _used(entry: Path) -> bool:
    """Mark an entry as used by this process; False if it is missing or incomplete."""
    if entry in _in_use and (_source(entry) is None or not _is_current(_in_use[entry], entry)):
        # Somebody cleared the cache by hand, and a lock on a deleted file keeps nobody out.
        _in_use.pop(entry).close()
    if entry not in _in_use:
        lock = _lock(entry, fcntl.LOCK_SH)
        if _source(entry) is None:
            lock.close()
            return False
        _in_use[entry] = lock
    # The kernel's own time can be milliseconds old, so two uses could seem to be simultaneous.
    now = time.time_ns()
    os.utime(entry / _SOURCE, ns=(now, now), follow_symlinks=False)
    return True


def _source(entry: Path) -> tuple[str, dict[str, RemoteFile]] | None:
    """URI and files of an entry; None if its record cannot be read, which makes the entry unusable."""
    try:
        source = json.loads(read_below(entry.parent, f"{entry.name}/{_SOURCE}"))
        files = {
            name: RemoteFile(int(size), str(version)) for name, (size, version) in source["files"].items()
        }
        # The copy is read by its path, which must not lead elsewhere.
        with held_directory(entry.parent, f"{entry.name}/{_CONTENT}"):
            return source["uri"], files
    except (RPGError, OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _bring(
    path: UPath,
    files: Mapping[str, RemoteFile],
    entry: Path,
    limit_bytes: int,
    check: Callable[[Path], object] | None,
) -> None:
    partial = entry.with_suffix(_PARTIAL)
    copy = partial / _CONTENT / path.name
    try:
        with _locked(entry.parent / "room", fcntl.LOCK_EX):
            _remove(partial)
            (partial / _CONTENT).mkdir(parents=True)
            missing = _link_known(path, files, copy)
            size = sum(file.size for file in missing.values())
            _make_room(path, entry.parent, size, limit_bytes)
            (partial / _RESERVED).write_text(str(size))
        try:
            _download_checked(path, missing, copy, check)
        except RPGError:
            # The damage may come from a linked file of an earlier copy, so the second download takes no
            # links.
            _remove(copy)
            _download_checked(path, files, copy, check)
        (partial / _SOURCE).write_text(json.dumps({"uri": str(path), "files": _versions(files)}))
        _sync(partial)
        partial.rename(entry)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    """Remove an entry as far as that is allowed; of a link, the link."""
    with suppress(OSError, RPGError):
        remove_below(path.parent, path.name)


def _sync(directory: Path) -> None:
    """Write all files to the disk, since a power failure could keep a later rename but lose their content."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def _download_checked(
    path: UPath, files: Mapping[str, RemoteFile], copy: Path, check: Callable[[Path], object] | None
) -> None:
    if files:
        with storage_errors_for(path):
            download(path, files, copy)
    if check is not None:
        try:
            check(copy)
        except RPGError as error:
            raise DamagedError(str(error).replace(str(copy), str(path).rstrip("/"))) from error


def _link_known(path: UPath, files: Mapping[str, RemoteFile], copy: Path) -> dict[str, RemoteFile]:
    """Link files of a directory that earlier copies have in the same version; return the others."""
    known = {}
    for entry in _entries(copy.parents[2]):
        uri, versions = _source(entry) or ("", {})
        if uri == str(path):
            for name, file in versions.items():
                known[name, file] = entry, f"{_CONTENT}/{path.name}/{name}"
    missing = {}
    for name, file in files.items():
        if name and (name, file) in known:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            # A link in an earlier copy would become a link in this one.
            with suppress(RPGError, OSError):
                open_below(known[name, file][0], known[name, file][1]).close()
                (copy / name).hardlink_to(known[name, file][0] / known[name, file][1])
                continue
        missing[name] = file
    return missing


def _make_room(path: UPath, cache: Path, size: int, limit_bytes: int) -> None:
    """Evict the entries that were used longest ago until `size` more bytes are within the limit."""
    if size > limit_bytes:
        raise RPGError(_no_room(path, cache, size, limit_bytes))
    for partial in cache.glob(f"*{_PARTIAL}"):
        # A killed process left it behind. If the process lives, it holds the lock, and nothing is removed.
        _evict(partial.with_suffix(""))
    for entry in _entries(cache):
        if _source(entry) is None:
            _evict(entry)
    by_last_use = sorted(_entries(cache), key=_last_use)
    for entry in by_last_use:
        if _taken(cache) + size <= limit_bytes:
            return
        _evict(entry)
    taken = _taken(cache)
    if taken + size > limit_bytes:
        in_use = f", {taken} of them used by running processes"
        raise RPGError(_no_room(path, cache, size, limit_bytes) + in_use)


def _no_room(path: UPath, cache: Path, size: int, limit_bytes: int) -> str:
    return (
        f"{path}: {size} bytes do not fit into the cache {cache}, whose limit is {limit_bytes} bytes "
        "(ray.cache_gigabytes of a job, cache.gigabytes of a service)"
    )


def _entries(cache: Path) -> list[Path]:
    # Other names are ignored, since a user may keep files of his own in the directory.
    listed = list_below(cache)
    return [cache / name for name, each in listed.items() if re.fullmatch(_KEY, name) and each.is_directory]


def _last_use(entry: Path) -> int:
    try:
        return (entry / _SOURCE).lstat().st_mtime_ns
    except OSError:
        return 0


def _taken(cache: Path) -> int:
    """Bytes of all entries, counting a file that several copies share once, and of running downloads."""
    sizes = {}
    for entry in _entries(cache):
        for directory, _, names, descriptor in os.fwalk(entry):
            for name in names:
                # What is removed meanwhile takes no room.
                with suppress(FileNotFoundError):
                    status = os.lstat(name, dir_fd=descriptor)
                    if stat.S_ISREG(status.st_mode) and directory != str(entry):
                        sizes[status.st_ino] = status.st_size
    reserved = 0
    for name in list_below(cache):
        if name.endswith(_PARTIAL):
            # Without a number, nothing is reserved.
            with suppress(RPGError, OSError, ValueError):
                reserved += max(0, int(read_below(cache, f"{name}/{_RESERVED}", 32)))
    return sum(sizes.values()) + reserved


def _evict(entry: Path) -> None:
    """Remove an entry, complete or partial, unless a living process holds its lock."""
    partial = entry.with_suffix(_PARTIAL)
    try:
        with _locked(entry, fcntl.LOCK_EX | fcntl.LOCK_NB):
            if entry.is_dir() and not entry.is_symlink():
                # If this process is killed while it removes files, the rest must not look complete.
                entry.rename(partial)
            _remove(partial)
            entry.with_suffix(".lock").unlink()
    except BlockingIOError:
        return


@contextmanager
def _locked(entry: Path, mode: int) -> Iterator[IO[bytes]]:
    with _lock(entry, mode) as lock:
        yield lock


def _lock(entry: Path, mode: int) -> IO[bytes]:
    path = entry.with_suffix(".lock")
    while True:
        lock = open_lock(path)
        try:
            fcntl.flock(lock, mode)
            # While this process waited, another may have evicted the entry and removed the lock's file.
            if _is_current(lock, entry):
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()


def _is_current(lock: IO[bytes], entry: Path) -> bool:
    """Whether a lock's file is still the one under its name, which other processes open."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), entry.with_suffix(".lock").lstat())
    except FileNotFoundError:
        return False
