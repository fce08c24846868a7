"""A generated model that is a directory: its weights, and beside them the collection's companion files."""

import os
import shutil
from pathlib import Path

from rpg.collection.companions import (
    ADAPTER_WEIGHTS,
    COMPANION_NAMES,
    DIFFUSERS_WEIGHTS,
    MODEL_WEIGHTS,
    Companions,
)
from rpg.errors import RPGError
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import AtomicFile, error_reason, partial_path
from rpg.storage.locations import AnyPath, exists, is_remote

_WRITTEN = COMPANION_NAMES | {ADAPTER_WEIGHTS, MODEL_WEIGHTS, DIFFUSERS_WEIGHTS}


class ModelDirectory:
    """A directory that appears as a whole, by `commit`, or not at all, by `discard`, like an `AtomicFile`.

    A new local directory is written beside its place and renamed. In an earlier model's directory, and behind
    a URI, files are replaced one by one, the weights last. Where the files beside them change, the earlier
    weights are removed first, so that a directory with weights is always whole. Other files in it stay.

    Attributes:
        path: the directory.
        temporary: the local file to write the weights to.
    """

    def __init__(self, path: AnyPath, companions: Companions) -> None:
        """Prepare to write the directory `path`, in which `companions` lie beside the weights.

        Raises:
            RPGError: naming `path`, if nothing can be written there.
        """
        self.path = path
        self._companions = companions
        self._weights: AtomicFile | None = None
        self.temporary: Path
        if is_remote(path):
            self._weights = AtomicFile(path / companions.weights_name)
            self.temporary = self._weights.temporary
            return
        assert isinstance(path, Path)
        self.temporary = partial_path(path) / companions.weights_name
        try:
            self.temporary.parent.mkdir(parents=True)
        except OSError as error:
            raise self.failure(error) from error

    def commit(self) -> None:
        """Put the directory in place.

        Raises:
            RPGError: naming the directory or the file that cannot be written. What was written is removed.
        """
        try:
            if self._weights is not None:
                if not self._has_companions():
                    self._remove_earlier()
                    self._companions.write(self.path)
                self._weights.commit()
                return
            self._companions.write(self.temporary.parent)
            with self.temporary.open("rb") as file:
                os.fsync(file.fileno())
            self._rename()
        except OSError as error:
            raise self.failure(error) from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was written, unless it is in place. May be called again."""
        if self._weights is not None:
            self._weights.discard()
        else:
            shutil.rmtree(self.temporary.parent, ignore_errors=True)

    def failure(self, error: OSError) -> RPGError:
        """The error to raise for `error`, which occurred while something was written."""
        if self._weights is not None:
            return self._weights.failure(error)
        return RPGError(f"{self.path}: cannot be written: {error_reason(error)}")

    def _rename(self) -> None:
        assert isinstance(self.path, Path)
        partial = self.temporary.parent
        try:
            # An empty directory is replaced as well.
            partial.rename(self.path)
        except OSError:
            if not self.path.is_dir():
                raise
            if not self._has_companions():
                self._remove_earlier()
                for name in self._companions.files:
                    (partial / name).replace(self.path / name)
            self.temporary.replace(self.path / self.temporary.name)

    def _has_companions(self) -> bool:
        """Whether nothing but the weights differs from what is in place."""
        own = {*self._companions.files, self.temporary.name}
        return self._companions.are_in(self.path) and self._earlier() <= own

    def _earlier(self) -> set[str]:
        """The names of an earlier model's files that are in place."""
        if not exists(self.path):
            return set()
        with storage_errors_for(self.path):
            return {path.name for path in self.path.iterdir()} & _WRITTEN

    def _remove_earlier(self) -> None:
        """Remove the files of an earlier model, its weights first."""
        for name in sorted(self._earlier(), key=lambda name: name in COMPANION_NAMES):
            with storage_errors_for(self.path, "cannot be written"):
                (self.path / name).unlink(missing_ok=True)
