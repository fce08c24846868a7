"""Failures of remote storage as one line that names the URI and what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from upath import UPath

from rpg.errors import RPGError, one_line

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""The extra of RPG that installs a protocol's package."""

# These errors come from the local disk, which a download has filled.
_LOCAL = {errno.ENOSPC, errno.EDQUOT}
_UNREACHABLE = {"ConnectionError", "TimeoutError", "HTTPClientError", "ClientConnectionError"}
_REFUSED_CREDENTIALS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"}


class StorageError(RPGError):
    """The storage behind a URI failed, or does not have the file."""


@contextmanager
def storage_errors_for(path: Path | UPath, failure: str = "cannot be read") -> Iterator[None]:
    """Turn an exception of a storage's package in the block into a `StorageError` that names `path`.

    The block should contain nothing but calls to the storage. Each package has exceptions of its own, so
    every exception counts as a failure of the storage. For a local path, exceptions are not changed.

    Args:
        path: the file or directory that the block reads or writes.
        failure: what the message says about `path`, such as "cannot be written".

    Raises:
        StorageError: naming `path`, if the storage behind it fails.
    """
    try:
        yield
    except RPGError:
        raise
    except Exception as error:
        if isinstance(path, Path) or (isinstance(error, OSError) and error.errno in _LOCAL):
            raise
        raise storage_error(path, failure, error) from error


def storage_error(path: UPath | str, failure: str, error: Exception) -> StorageError:
    """The `StorageError` for an exception of a storage's package; `failure` says what it prevented."""
    # Classes are compared by name: the packages are optional, and share only Python's own classes.
    names = {each.__name__ for each in type(error).__mro__}
    reason = _reason(error)
    if isinstance(error, ImportError):
        protocol = str(path).partition("://")[0]
        extra = EXTRAS.get(protocol)
        hint = f"pip install 'rpg[{extra}]'" if extra else reason
        return StorageError(f"{path}: the package for {protocol}:// is not installed: {hint}")
    if any("Credentials" in name for name in names):
        return StorageError(
            f"{path}: {failure}: no credentials; expected them in the environment or in the provider's "
            f"configuration files ({reason})"
        )
    if _code(error) in _REFUSED_CREDENTIALS:
        return StorageError(f"{path}: {failure}: credentials refused: {reason}")
    if isinstance(error, PermissionError):
        return StorageError(f"{path}: {failure}: permission denied: {reason}")
    if names & _UNREACHABLE:
        return StorageError(f"{path}: {failure}: the storage cannot be reached: {reason}")
    if isinstance(error, FileNotFoundError):
        says = f": {reason}" if _code(error) == "NoSuchBucket" else ""
        return StorageError(f"{path}: {failure}: not found{says}")
    return StorageError(f"{path}: {failure}: {reason}")


def _code(error: Exception) -> str:
    """The error code of the S3 response that an exception was made from; empty if there is none."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)
