"""Locations: local paths and URIs (`s3://`, `gs://`, whatever fsspec opens) behind one interface.

`Path` and `UPath` share the methods of `pathlib`. This module has what differs: how a user writes a location,
and how a file behind a URI becomes a local one.
"""

import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from upath import UPath

from rpg.errors import RPGError
from rpg.storage.download import download, remote_files
from rpg.storage.errors import EXTRAS, storage_error, storage_errors_for

AnyPath = Path | UPath
"""A local path or a URI."""

# Listings must not be cached, because other processes write too.
_OPTIONS: dict[str, Any] = {"use_listings_cache": False}
# These settings give up an endpoint that is gone within half a minute. s3fs itself retries one that is busy.
_S3_OPTIONS = {
    "config_kwargs": {"connect_timeout": 5, "retries": {"mode": "standard", "total_max_attempts": 3}}
}


def location(text: str) -> AnyPath:
    """The location that a user wrote: a URI, or a local path, which is made absolute with `~` expanded.

    It need not exist: nothing is read.

    Raises:
        RPGError: for an unknown protocol, one whose package is not installed, or a URI without a bucket.
    """
    if "://" not in text:
        try:
            return Path(text).expanduser().absolute()
        except RuntimeError as error:
            raise RPGError(f"{text}: {error}") from error
    protocol = text.partition("://")[0]
    options = _OPTIONS | (_S3_OPTIONS if EXTRAS.get(protocol) == "s3" else {})
    try:
        if not protocol:
            raise ValueError(text)
        if protocol in ("file", "local"):
            return Path(UPath(text).path).absolute()
        path: UPath = UPath(text.rstrip("/") if not text.endswith("://") else text, **options)
        filesystem = path.fs
    except ValueError as error:
        raise RPGError(
            f"{text}: unknown protocol '{protocol}'; expected a local path or a URI such as s3://bucket/key"
        ) from error
    except Exception as error:
        raise storage_error(text, "cannot be used", error) from error
    if protocol in EXTRAS and not filesystem._strip_protocol(path.path).partition("/")[0]:
        raise RPGError(f"{text}: no bucket; expected a URI such as {protocol}://bucket/key")
    return path


def is_remote(path: AnyPath) -> TypeGuard[UPath]:
    """Whether `path` is a URI."""
    return not isinstance(path, Path)


def exists(path: AnyPath) -> bool:
    """Whether there is a file or directory at `path`.

    Raises:
        RPGError: naming the URI, if its storage cannot be reached.
    """
    with storage_errors_for(path):
        return bool(path.exists())


def identity(path: AnyPath) -> object | None:
    """A value that changes when the file at `path` is replaced; None if there is no file.

    Raises:
        RPGError: naming the URI, if its storage cannot be reached.
    """
    if isinstance(path, Path):
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None
    with storage_errors_for(path):
        try:
            return tuple(remote_files(path).values())
        except FileNotFoundError:
            return None


@contextmanager
def fetched(
    path: AnyPath, needed: Callable[[Collection[str]], Collection[str]] | None = None
) -> Iterator[Path]:
    """Yield a local path with the content of a file or directory: `path` itself, or a temporary copy of a
    URI.

    The copy has the same name. It is removed when the block ends, but tensors that are mapped from it stay
    usable. In the message of an `RPGError` raised in the block, the URI takes the place of the copy's path.
    Of a remote directory only the files are copied that `needed` picks from their relative paths (default:
    all).

    Raises:
        RPGError: naming the URI, if it cannot be read.
    """
    if isinstance(path, Path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="rpg-") as temporary:
        local = Path(temporary) / path.name
        try:
            with storage_errors_for(path):
                _fetch(path, local, needed)
        except OSError as error:
            raise RPGError(f"{temporary}: cannot hold a copy of {path}: {error.strerror}") from error
        try:
            yield local
        except RPGError as error:
            raise RPGError(str(error).replace(str(local), str(path).rstrip("/"))) from error


def _fetch(path: UPath, local: Path, needed: Callable[[Collection[str]], Collection[str]] | None) -> None:
    # A file takes one request this way. For a directory only some storages raise an error.
    with suppress(FileNotFoundError, IsADirectoryError):
        path.fs.get_file(path.path, str(local))
        if local.is_file():
            return
    files = remote_files(path)
    if needed is not None and "" not in files:
        local.mkdir()
        files = {name: files[name] for name in needed(files)}
    download(path, files, local)
