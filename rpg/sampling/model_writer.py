"""Writing one generated model token by token: a `.safetensors` file of known size, or a directory with one.

The file format lets every tensor's place be known beforehand (an 8-byte length, a JSON header, then the raw
values), so finished tokens are written where they belong and no model is ever held in memory as a whole.
"""

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO

import torch
from torch import Tensor
from upath import UPath

from rpg.collection.companions import Companions
from rpg.collection.layout import Layout
from rpg.collection.safetensors_file import LARGEST_HEADER
from rpg.sampling.model_directory import ModelDirectory
from rpg.sampling.model_format import ModelFormat, NotFiniteError
from rpg.storage.files import AtomicFile, sha256
from rpg.storage.locations import AnyPath

_FIRST_READ = 2**16


class ModelWriter:
    """Writes one model: `open`, then its tokens in any order, then `commit` or `discard`.

    The file, or the directory, appears under its name at `commit`, and not at all otherwise. Methods may be
    called from any thread, one at a time.

    Attributes:
        path: the file or directory.
        layout: of the model.
        size: bytes of the file of weights.
    """

    def __init__(
        self,
        path: AnyPath,
        layout: Layout,
        metadata: Mapping[str, str],
        dtype: torch.dtype | None = None,
        companions: Companions | None = None,
        root: AnyPath | None = None,
    ) -> None:
        """Write to `path` a model of `layout`, with `metadata` in the file's header.

        Args:
            path: the model's file, or with `companions` its directory.
            layout: of the model.
            metadata: texts by key.
            dtype: of its floating-point tensors, as with `module.to(dtype)`; None: the layout's own.
            companions: files to lie beside the weights; if there are none, the model is one file.
            root: a directory that a model which is a file lies below, as in `AtomicFile`.
        """
        self.path = path
        self._root = root
        self._companions = companions
        self.layout = layout
        self._format = ModelFormat(layout, dtype)
        self._header = self._format.values.header(metadata)
        self.size = len(self._header) + self._format.values.size

    def open(self) -> "ModelWriter":
        """Begin the file: its header, its full size, and the tensors that are not sampled.

        Raises:
            RPGError: naming the file, if it cannot be written; nothing is left of it then.
        """
        companions = self._companions
        self._target = (
            ModelDirectory(self.path, companions) if companions else AtomicFile(self.path, root=self._root)
        )
        try:
            with self._storage_errors():
                self._file: IO[bytes] = self._target.temporary.open("wb")
        except BaseException:
            self._target.discard()
            raise
        try:
            with self._storage_errors():
                self._file.write(self._header)
                self._file.truncate(self.size)
            for name, value in self.layout.constants.items():
                self._write(name, 0, value.flatten().to(self._format.dtypes[name]))
        except BaseException:
            self.discard()
            raise
        return self

    def write_token(self, index: int, values: Tensor) -> None:
        """Write the token `index` of the layout, given its normalised `values` [token_size].

        Raises:
            NotFiniteError: naming file and tensor, if the weights are not finite.
            RPGError: naming the file, if it cannot be written.
        """
        for spec, start, decoded in self.layout.decode_token(index, values):
            # What is too large for the file's type becomes infinite here.
            weights = decoded.to(self._format.dtypes[spec.name])
            if not _finite(weights):
                raise NotFiniteError(self.path, spec.name)
            self._write(spec.name, start, weights)

    def write_weights(self, first: int, weights: Tensor, finite: Tensor) -> None:
        """Write the tokens from `first` on, given their weights.

        Args:
            first: index of the first token.
            weights: float32 [k, token_size].
            finite: bool [k], whether a token's weights are.

        Raises:
            NotFiniteError: naming file and tensor, if weights are not finite.
            RPGError: naming the file, if it cannot be written.
        """
        row = 0
        while row < len(weights):
            spec = self.layout.spec_of(first + row)
            token = first + row - spec.first_token
            rows = min(len(weights) - row, spec.tokens - token)
            start = token * self.layout.token_size
            values = weights[row : row + rows].reshape(-1)[: spec.numel - start]
            written = values.to(spec.dtype).to(self._format.dtypes[spec.name])
            # Narrow types make infinite what is too large for them.
            if not (finite[row : row + rows].all() and (written.dtype == values.dtype or _finite(written))):
                raise NotFiniteError(self.path, spec.name)
            self._write(spec.name, start, written)
            row += rows

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the file of weights, once all its tokens are written and before `commit`."""
        with self._storage_errors():
            self._file.flush()
            return sha256(self._target.temporary)

    def commit(self) -> None:
        """Put the file or directory in place, on the disk or behind its URI.

        Raises:
            RPGError: naming the file, if it cannot be written; nothing is left of it then.
        """
        try:
            with self._storage_errors():
                self._file.close()
            self._target.commit()
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what was written, unless it has been put in place."""
        # Closing writes what is buffered, which a full disk refuses; the file is not wanted anyway.
        with suppress(OSError):
            self._file.close()
        self._target.discard()

    def _write(self, name: str, start: int, values: Tensor) -> None:
        data = values.contiguous().view(torch.uint8).numpy().data
        with self._storage_errors():
            for each in self._format.names.get(name, ()):
                first = len(self._header) + self._format.values.offsets[each]
                self._put(first + start * values.element_size(), data)

    def _put(self, position: int, data: memoryview) -> None:
        self._file.seek(position)
        self._file.write(data)

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._target.failure(error) from error


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())


def remote_metadata(path: UPath) -> dict[str, str] | None:
    """The metadata of a model behind a URI, read from its beginning alone; None if there is no model."""
    try:
        head = path.fs.cat_file(path.path, start=0, end=_FIRST_READ)
        (length,) = struct.unpack("<Q", head[:8])
        if 8 + length > len(head):
            head = path.fs.cat_file(path.path, start=0, end=min(8 + length, LARGEST_HEADER))
        metadata: dict[str, str] = json.loads(head[8 : 8 + length])["__metadata__"]
        return metadata
    # What is no model is replaced by one.
    except (FileNotFoundError, struct.error, ValueError, KeyError, TypeError):
        return None
