"""The local file system with files that appear as a whole or not at all, as objects in a store do.

Ray Train writes its list of complete checkpoints in place: a job killed in that moment could not be resumed.
"""

import io
import os
from pathlib import Path
from typing import Any

import pyarrow.fs
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]


class WholeFiles(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Files are written beside their target, synced to disk and renamed."""

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if mode == "wb":
            return _WholeFile(Path(path))
        return super()._open(path, mode, block_size, **options)


def whole_files() -> Any:
    """The file system as pyarrow's, for Ray."""
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(WholeFiles(auto_mkdir=True)))


class _WholeFile(io.BufferedWriter):
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
