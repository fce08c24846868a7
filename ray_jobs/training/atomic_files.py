"""The file systems that Ray Train writes to: files appear as a whole or not at all.

Ray Train writes its list of complete checkpoints in place, so a job that is killed in that moment could not
be resumed. Objects in a store appear as a whole anyway; on a local disk this module sees to it.
"""

import io
import os
from pathlib import Path
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

from rpg.storage.locations import AnyPath


def storage_filesystem(storage: AnyPath) -> tuple[Any, str]:
    """The file system to write `storage` with, as pyarrow's, and the path of `storage` on it."""
    if isinstance(storage, Path):
        return _as_pyarrow(AtomicFiles(auto_mkdir=True)), str(storage)
    return _as_pyarrow(storage.fs), storage.path


class AtomicFiles(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The local file system; files are written beside their target, synced to disk and renamed."""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if mode == "wb":
            return _AtomicWriter(Path(path))
        return super()._open(path, mode, block_size, **options)


class _AtomicWriter(io.BufferedWriter):
    def __init__(self, target: Path) -> None:
        self._target = target
        self._partial = target.parent / f".{target.name}.{os.getpid()}.partial"
        self._failed = False
        super().__init__(io.FileIO(self._partial, "w"))

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            self._failed = True
            raise

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
            if not self._failed:
                self._partial.replace(self._target)
        finally:
            try:
                super().close()
            finally:
                self._partial.unlink(missing_ok=True)


def _as_pyarrow(filesystem: Any) -> Any:
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
