"""Writing one generated model token by token into a `.safetensors` file of known size.

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

from rpg.collection.layout import Layout
from rpg.errors import RPGError
from rpg.storage.files import AtomicFile, sha256
from rpg.storage.locations import AnyPath

_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip


_FIRST_READ = 2**16
_LARGEST_HEADER = 100_000_000
"""As in the reference implementation of the format."""


class NotFiniteError(RPGError):
    """Weights that a generator made are NaN or infinite."""


class ModelWriter:
    """Writes one model: `open`, then its tokens in any order, then `commit` or `discard`.

    The file appears under its name at `commit`, and not at all otherwise. Tied tensors are written under each
    of their names, since the format knows no ties. Methods may be called from any thread, one at a time.

    Attributes:
        path: the file.
        layout: of the model.
        size: bytes of the whole file.
    """

    def __init__(
        self,
        path: AnyPath,
        layout: Layout,
        metadata: Mapping[str, str],
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write to `path` a model of `layout`, with `metadata` in the file's header.

        `dtype` is that of its floating-point tensors, as with `module.to(dtype)`; None: the layout's own.
        """
        self.path = path
        self.layout = layout
        self._offsets: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}
        self._dtypes = {
            spec.name: dtype if dtype is not None and spec.dtype.is_floating_point else spec.dtype
            for spec in layout.specs
        }
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        # Wide types first keeps every tensor aligned to its element size.
        for spec in sorted(layout.specs, key=lambda spec: (-self._dtypes[spec.name].itemsize, spec.name)):
            size = spec.numel * self._dtypes[spec.name].itemsize
            header[spec.name] = {
                "dtype": _DTYPE_NAMES[self._dtypes[spec.name]],
                "shape": list(spec.shape),
                "data_offsets": [end, end + size],
            }
            self._offsets[spec.name] = end
            self._names.setdefault(spec.alias_of or spec.name, []).append(spec.name)
            end += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._header = struct.pack("<Q", len(text)) + text
        self.size = len(self._header) + end

    def open(self) -> "ModelWriter":
        """Begin the file: its header, its full size, and the tensors that are not sampled.

        Raises:
            RPGError: naming the file, if it cannot be written; nothing is left of it then.
        """
        self._target = AtomicFile(self.path)
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
                self._write(name, 0, value.flatten().to(self._dtypes[name]))
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
            weights = decoded.to(self._dtypes[spec.name])
            if not _finite(weights):
                raise NotFiniteError(
                    f"{self.path}: tensor '{spec.name}': NaN or infinite values were generated"
                )
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
            written = values.to(spec.dtype).to(self._dtypes[spec.name])
            # Narrow types make infinite what is too large for them.
            if not (finite[row : row + rows].all() and (written.dtype == values.dtype or _finite(written))):
                raise NotFiniteError(
                    f"{self.path}: tensor '{spec.name}': NaN or infinite values were generated"
                )
            self._write(spec.name, start, written)
            row += rows

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the file, once all its tokens are written and before `commit`."""
        with self._storage_errors():
            self._file.flush()
            return sha256(self._target.temporary)

    def commit(self) -> None:
        """Put the file in place, on the disk or behind its URI.

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
            for each in self._names.get(name, ()):
                self._put(len(self._header) + self._offsets[each] + start * values.element_size(), data)

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
            head = path.fs.cat_file(path.path, start=0, end=min(8 + length, _LARGEST_HEADER))
        metadata: dict[str, str] = json.loads(head[8 : 8 + length])["__metadata__"]
        return metadata
    # What is no model is replaced by one.
    except (FileNotFoundError, struct.error, ValueError, KeyError, TypeError):
        return None
