"""Locations: local paths and URIs (`s3://`, `gs://`, whatever fsspec opens) behind one interface.

`Path` and `UPath` share the methods of `pathlib`. What differs is told here: how a location is written, and
how something behind a URI becomes a local file for those who need one.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeGuard

from upath import UPath

from rpg.errors import RPGError
from rpg.storage.download import download, remote_files
from rpg.storage.errors import EXTRAS, storage_error, storage_errors_for

AnyPath = Path | UPath
"""A local path or a URI."""

# Other processes write as well, so listings must not be remembered.
_OPTIONS: dict[str, Any] = {"use_listings_cache": False}
# An endpoint that is gone is given up within half a minute; s3fs goes on trying one that is only busy.
_S3_OPTIONS = {
    "config_kwargs": {"connect_timeout": 5, "retries": {"mode": "standard", "total_max_attempts": 3}}
}


def location(text: str) -> AnyPath:
    """The location that a user wrote: a URI, or a local path made absolute, `~` expanded.

    Nothing is read, so it may not exist.

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
    """Whether `path` lies behind a URI."""
    return not isinstance(path, Path)


def exists(path: AnyPath) -> bool:
    """Whether there is a file or directory at `path`.

    Raises:
        RPGError: naming the URI, if its storage cannot be asked.
    """
    with storage_errors_for(path):
        return bool(path.exists())


def identity(path: AnyPath) -> object | None:
    """What changes when the file at `path` is replaced; None if there is none.

    Raises:
        RPGError: naming the URI, if its storage cannot be asked.
    """
    if isinstance(path, Path):
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None
    with storage_errors_for(path):
        try:
            return tuple(remote_files(path).values())
        except FileNotFoundError:
            return None


@contextmanager
def fetched(path: AnyPath) -> Iterator[Path]:
    """Yield a local path with the file or directory's content: itself, or a temporary copy of a remote one.

    The copy has the same name and is removed when the block ends; memory-mapped tensors of it stay. An
    `RPGError` about the copy, raised in the block, names the URI instead.

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
                _fetch(path, local)
        except OSError as error:
            raise RPGError(f"{temporary}: cannot hold a copy of {path}: {error.strerror}") from error
        try:
            yield local
        except RPGError as error:
            raise RPGError(str(error).replace(str(local), str(path).rstrip("/"))) from error


def _fetch(path: UPath, local: Path) -> None:
    # A file is one request this way; only some storages know at once that it is none.
    with suppress(FileNotFoundError, IsADirectoryError):
        path.fs.get_file(path.path, str(local))
        if local.is_file():
            return
    download(path, remote_files(path), local)
