"""One shard: an uncompressed Arrow IPC file of tokens, with a record batch a checkpoint and a row a token.

Shards are memory-mapped for reading, so that reading a token reads only the pages that contain it.
"""

import ctypes
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.config import TokenDtype
from rpg.errors import RPGError, one_line
from rpg.storage.below import path_below
from rpg.storage.files import replacing_file, sha256
from rpg.storage.locations import AnyPath

_CHECKED_VALUES = 2**20
COLUMN = "tokens"
DTYPE_KEY = b"rpg.token_dtype"
LAYOUT_KEY = b"rpg.layout"

# Arrow has no bfloat16: its bit patterns are stored as uint16, and the schema's metadata says so.
_ARROW_TYPES = {
    TokenDtype.float32: pa.float32(),
    TokenDtype.float16: pa.float16(),
    TokenDtype.bfloat16: pa.uint16(),
}
_TORCH_DTYPES = {
    TokenDtype.float32: torch.float32,
    TokenDtype.float16: torch.float16,
    TokenDtype.bfloat16: torch.bfloat16,
}
_NUMPY_DTYPES: dict[TokenDtype, npt.DTypeLike] = {
    TokenDtype.float32: np.float32,
    TokenDtype.float16: np.float16,
    TokenDtype.bfloat16: np.uint16,
}

_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest needs to know about a shard that was written."""

    file: str
    """Name within the shards' directory."""
    bytes: int
    sha256: str
    checkpoints: tuple[str, ...]
    """Names in the order of the record batches."""
    layout: str
    """Digest of the layout that the tokens were made with."""
    dtype: TokenDtype


def write_shard(
    path: AnyPath, layout: Layout, checkpoints: Iterable[tuple[str, Mapping[str, Tensor]]], dtype: TokenDtype
) -> ShardInfo:
    """Write checkpoints, as (name, state_dict) pairs, to one shard; one is held in memory at a time.

    Raises:
        RPGError: naming the checkpoint and tensor, if one does not fit the layout or has values that are not
            finite in `dtype`; naming the file, if there are no checkpoints or the file system refuses; if the
            layout has no tokens. An earlier file stays as it was.
    """
    if layout.tokens == 0:
        raise RPGError(
            f"{path}: nothing to write: no tensor differs between checkpoints, so there are no tokens"
        )
    schema = _schema(layout, dtype)
    names = []
    with replacing_file(path) as temporary:
        with temporary.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
            for name, state_dict in checkpoints:
                writer.write_batch(_record_batch(name, state_dict, layout, dtype, schema))
                names.append(name)
        if not names:
            raise RPGError(f"{path}: nothing to write: expected at least one checkpoint")
        size, digest = temporary.stat().st_size, sha256(temporary)
    return ShardInfo(path.name, size, digest, tuple(names), layout.digest(), dtype)


def open_shard(path: Path, layout: Layout, dtype: TokenDtype, checkpoints: int) -> npt.NDArray[Any]:
    """Map a shard: a read-only array [checkpoints, tokens, token_size] of stored values over the file.

    Raises:
        RPGError: naming the file, if it is missing, not an Arrow file, or not a shard of this layout, dtype
            and number of checkpoints.
    """
    buffer = _mapped(path)
    try:
        reader = pa.ipc.open_file(buffer)
        schema, batches = reader.schema, reader.num_record_batches
    except (OSError, ValueError) as error:
        raise RPGError(f"{path}: not an Arrow file: {one_line(error)}") from error
    if not schema.equals(_schema(layout, dtype), check_metadata=True):
        raise RPGError(
            f"{path}: expected {dtype} tokens of {layout.token_size} values, made with {layout.digest()}"
        )
    if batches != checkpoints:
        raise RPGError(f"{path}: expected {checkpoints} record batches, found {batches}")
    return _strided(path, buffer, reader, layout, dtype)


def token_bytes(layout: Layout, dtype: TokenDtype) -> int:
    """Bytes of one checkpoint's tokens."""
    return layout.tokens * layout.token_size * np.dtype(_NUMPY_DTYPES[dtype]).itemsize


def empty_tokens(shape: tuple[int, ...], dtype: TokenDtype, pinned: bool) -> Tensor:
    """An uninitialised tensor for token values of a storage type, in page-locked memory if `pinned`."""
    return torch.empty(shape, dtype=_TORCH_DTYPES[dtype], pin_memory=pinned)


def as_stored(tokens: Tensor) -> npt.NDArray[Any]:
    """A tensor of token values as a NumPy array of the stored type, without a copy."""
    # NumPy has no bfloat16, so shards hold its bits as uint16.
    bits = tokens.dtype == torch.bfloat16
    return tokens.view(torch.uint16).numpy() if bits else tokens.numpy()


def _schema(layout: Layout, dtype: TokenDtype) -> Any:
    metadata = {DTYPE_KEY: dtype.value.encode(), LAYOUT_KEY: layout.digest().encode()}
    value = pa.field("item", _ARROW_TYPES[dtype], nullable=False)
    column = pa.field(COLUMN, pa.list_(value, layout.token_size), nullable=False)
    return pa.schema([column], metadata=metadata)


def _record_batch(
    name: str, state_dict: Mapping[str, Tensor], layout: Layout, dtype: TokenDtype, schema: Any
) -> Any:
    try:
        tokens = layout.encode(state_dict).tokens.to(_TORCH_DTYPES[dtype])
    except RPGError as error:
        raise RPGError(f"{name}: {error}") from error
    # Some rows at a time, because the check makes copies, and an embedding may be most of the memory.
    rows = tokens.split(max(1, _CHECKED_VALUES // layout.token_size))
    finite = torch.cat([torch.isfinite(some).all(dim=1) for some in rows])
    if not bool(finite.all()):
        tensor = layout.spec_of(int((~finite).nonzero()[0])).name
        raise RPGError(f"{name}: tensor '{tensor}': expected values that are finite as {dtype} tokens")
    stored = as_stored(tokens)
    arrow_type = schema.field(COLUMN).type
    values = pa.Array.from_buffers(arrow_type.value_type, stored.size, [None, pa.py_buffer(stored)])
    column = pa.FixedSizeListArray.from_arrays(values, type=arrow_type)
    return pa.record_batch([column], schema=schema)


def _mapped(path: Path) -> Any:
    """A file's bytes, mapped for as long as the buffer or anything that uses its memory lives.

    PyTorch maps the file, because Python's own mmap keeps a descriptor for each file, and a collection may
    have more shards than a process may open files. pyarrow's memory map asks the kernel for the whole file as
    soon as it is read.
    """
    try:
        with path_below(path.parent, path.name) as local:
            size = local.stat().st_size
            values = torch.from_file(str(local), shared=False, size=size, dtype=torch.uint8).numpy()
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found; expected a shard") from error
    except (OSError, RuntimeError) as error:
        raise RPGError(f"{path}: cannot be read as a shard: {one_line(error)}") from error
    if hasattr(mmap, "MADV_RANDOM"):
        # Without this advice the kernel reads ahead at each new place, on some systems by megabytes.
        _madvise(values.ctypes.data, size, mmap.MADV_RANDOM)
    values.flags.writeable = False
    return pa.py_buffer(values)


def _strided(path: Path, buffer: Any, reader: Any, layout: Layout, dtype: TokenDtype) -> npt.NDArray[Any]:
    """All record batches as one strided array: they have the same size, so they start at equal distances."""
    count = reader.num_record_batches

    def offset(batch: int) -> int:
        column = reader.get_batch(batch).column(0)
        if len(column) != layout.tokens:
            raise RPGError(
                f"{path}: record batch {batch}: expected {layout.tokens} rows, found {len(column)}"
            )
        address: int = column.flatten().buffers()[1].address
        return address - int(buffer.address)

    try:
        first, second, last = (offset(min(batch, count - 1)) for batch in (0, 1, count - 1))
    except (OSError, ValueError) as error:
        raise RPGError(f"{path}: not an Arrow file: {one_line(error)}") from error
    stride = second - first
    if last - first != stride * (count - 1):
        raise RPGError(f"{path}: expected record batches of equal size, as shards have them")
    item = np.dtype(_NUMPY_DTYPES[dtype])
    row = layout.token_size * item.itemsize
    shape = (count, layout.tokens, layout.token_size)
    return np.ndarray(shape, item, buffer=buffer, offset=first, strides=(stride, row, item.itemsize))
