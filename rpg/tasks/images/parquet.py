"""Images in Parquet files, with the columns that data sets on the Hugging Face Hub have.

An image is the content of an image file: in the column `img` or `image`, as a struct with `bytes`, or as
binary. Its class is an integer in the column `label`, or `fine_label` (CIFAR-100).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from rpg.errors import RPGError, one_line
from rpg.storage.below import open_below
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath
from rpg.tasks.images.part import MOST_BYTES, Encoded, Part, encoded_part

_IMAGES, _CLASSES = ("img", "image"), ("label", "fine_label")
_EXPECTED = "expected images in a column img or image (struct with bytes, or binary) and integers in label"
_ROWS_AT_ONCE = 500


def parquet_part(root: AnyPath, names: Sequence[str]) -> Part:
    """The images of the files `names` in the directory `root`, in their order.

    Raises:
        RPGError: naming the file, if it holds no such images.
    """
    classes = [_read_classes(root, name) for name in names]
    source = str(root / names[0]) if len(names) == 1 else f"{root} ({names[0]} and others)"
    return encoded_part(source, np.concatenate(classes), partial(_encoded, root, names))


@contextmanager
def _opened(root: AnyPath, name: str) -> Iterator[tuple[pq.ParquetFile, str, str]]:
    """The file, and the names of its columns of images and classes."""
    path = root / name
    try:
        with storage_errors_for(path), open_below(root, name) as file:
            parquet = pq.ParquetFile(file)
            images, classes = (_column(path, parquet, names) for names in (_IMAGES, _CLASSES))
            yield parquet, images, classes
    except (pa.ArrowException, OSError, ValueError) as error:
        raise RPGError(f"{path}: not readable as Parquet: {one_line(error)[:200]}") from error


def _column(path: AnyPath, parquet: pq.ParquetFile, names: Sequence[str]) -> str:
    there = parquet.schema_arrow.names
    if not (found := [name for name in names if name in there]):
        raise RPGError(f"{path}: no column '{names[0]}'; {_EXPECTED}, found {', '.join(there)}")
    return found[0]


def _read_classes(root: AnyPath, name: str) -> npt.NDArray[np.int64]:
    path = root / name
    with _opened(root, name) as (parquet, images, classes):
        kind = parquet.schema_arrow.field(images).type
        is_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
        if not _is_binary(kind.field("bytes").type if is_struct else kind):
            raise RPGError(f"{path}: column '{images}' is {kind}; {_EXPECTED}")
        column = parquet.read(columns=[classes])[classes]
        if not pa.types.is_integer(column.type) or column.null_count:
            raise RPGError(
                f"{path}: column '{classes}' is {column.type}, {column.null_count} missing; {_EXPECTED}"
            )
        read: npt.NDArray[np.int64] = column.to_numpy().astype(np.int64)
        return read


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _encoded(root: AnyPath, names: Sequence[str]) -> Iterator[Encoded]:
    for name in names:
        row = 0
        with _opened(root, name) as (parquet, images, _):
            # A row group is decompressed as a whole.
            groups = (parquet.metadata.row_group(i) for i in range(parquet.metadata.num_row_groups))
            if any(group.total_byte_size > MOST_BYTES for group in groups):
                raise RPGError(f"{root / name}: expected row groups of at most {MOST_BYTES:,} bytes")
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=[images]):
                column = batch.column(0)
                values = column.field("bytes") if pa.types.is_struct(column.type) else column
                for content in values.to_pylist():
                    yield f"{root / name}: row {row}", content
                    row += 1
