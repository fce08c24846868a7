"""CIFAR-10's images and their split into training and validation images.

They come as Parquet, `train.parquet` (50,000 images) and `test.parquet` (10,000) in one directory or behind
one URI, with the columns of CIFAR-10 on the Hugging Face Hub: `img`, a struct whose `bytes` are an image
file, and `label`, the class as an integer 0 … 9. Or they come in CIFAR-10's own files, which torchvision
downloads to the directory `cifar-10-batches-py`.
"""

import io
import pickletools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from rpg.errors import RPGError
from rpg.storage.below import read_regular
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath, exists, location

CLASSES = 10
SIZE = 32
VALIDATION_SHARE = 0.1
"""Share of the training images by which settings are chosen. Nothing is trained on them."""

_PARQUET = {"train": "train.parquet", "test": "test.parquet"}
_BATCHES_DIRECTORY = "cifar-10-batches-py"
_BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"}
"""Pickle instructions whose value is an integer."""
_COLUMNS = ("img", "label")
_EXPECTED = "expected CIFAR-10 as Parquet, columns img (struct with bytes) and label (integer)"
_MOST_BYTES = 2**30
_MIXED_BY = 0
"""Seed of the split into training and validation images, which is always the same."""
_DECODERS, _ROWS_A_TURN = 4, 500


@dataclass(frozen=True)
class Images:
    """Images, uint8 [N, 32, 32, 3] (RGB), and their classes, int64 [N]."""

    pixels: Tensor
    classes: Tensor

    def to(self, device: torch.device) -> "Images":
        """The same images on another device."""
        return Images(self.pixels.to(device), self.classes.to(device))


@lru_cache(maxsize=3)
def cifar10_images(directory: str, split: str) -> Images:
    """One of the splits `train` (45,000 of the training file), `validation` (the other 5,000) and `test`.

    Args:
        directory: path or URI of the files, the setting `collect.images`.
        split: its name.

    Raises:
        RPGError: naming the setting or the file, if it is missing or does not hold CIFAR-10.
    """
    images = _read(directory, "test" if split == "test" else "train")
    if split == "test":
        return images
    order = torch.randperm(len(images.classes), generator=torch.Generator().manual_seed(_MIXED_BY))
    held_back = round(VALIDATION_SHARE * len(order))
    chosen = order[:held_back] if split == "validation" else order[held_back:]
    return Images(images.pixels[chosen], images.classes[chosen])


def check_files(directory: str) -> None:
    """Raise an `RPGError` if a file is missing, before any work is done."""
    for part in _PARQUET:
        _files(directory, part)


def _files(directory: str, part: str) -> list[AnyPath]:
    """The files of the training or the test images: one Parquet file, or torchvision's batches."""
    if not directory:
        raise RPGError(
            "collect.images: expected the directory or URI of train.parquet and test.parquet, or of "
            f"{_BATCHES_DIRECTORY}, got none"
        )
    root = location(directory)
    files = [root / _PARQUET[part]]
    if not exists(files[0]) and exists(root / _BATCHES_DIRECTORY):
        files = [root / _BATCHES_DIRECTORY / name for name in _BATCHES[part]]
    for path in files:
        if not exists(path):
            raise RPGError(f"{path}: not found (collect.images); {_EXPECTED}")
    return files


@lru_cache(maxsize=1)
def _read(directory: str, part: str) -> Images:
    files = _files(directory, part)
    if files[0].name == _PARQUET[part]:
        return _read_parquet(files[0])
    pixels, classes = zip(*(read_batch_file(path) for path in files), strict=True)
    return Images(torch.from_numpy(np.concatenate(pixels)), _classes(directory, np.concatenate(classes)))


def _classes(source: object, classes: npt.NDArray[np.int64]) -> Tensor:
    if not len(classes):
        raise RPGError(f"{source}: holds no images")
    if classes.min() < 0 or classes.max() >= CLASSES:
        raise RPGError(
            f"{source}: labels: expected 0 to {CLASSES - 1}, found {classes.min()} to {classes.max()}"
        )
    return torch.from_numpy(classes)


def _read_parquet(path: AnyPath) -> Images:
    with storage_errors_for(path):
        content = read_regular(path, _MOST_BYTES)
    try:
        parquet = pq.ParquetFile(pa.BufferReader(content))
        names = parquet.schema_arrow.names
        if missing := [column for column in _COLUMNS if column not in names]:
            raise RPGError(f"{path}: no column '{missing[0]}'; {_EXPECTED}, found {', '.join(names)}")
        table = parquet.read(columns=list(_COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise RPGError(f"{path}: not readable as Parquet: {' '.join(str(error).split())}") from error
    kind = table.schema.field("img").type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise RPGError(f"{path}: column 'img' is {kind}; {_EXPECTED}")
    if not pa.types.is_integer(table.schema.field("label").type) or table["label"].null_count:
        raise RPGError(f"{path}: column 'label' is {table.schema.field('label').type}; {_EXPECTED}")
    classes = _classes(path, table["label"].to_numpy().astype(np.int64))
    encoded = table["img"].combine_chunks().field("bytes").to_pylist()
    pixels = np.empty((len(encoded), SIZE, SIZE, 3), np.uint8)

    def decode(start: int) -> None:
        for row in range(start, min(start + _ROWS_A_TURN, len(encoded))):
            pixels[row] = _decoded(encoded[row], f"{path}: row {row}")

    with ThreadPoolExecutor(_DECODERS) as pool:
        for _ in pool.map(decode, range(0, len(encoded), _ROWS_A_TURN)):
            pass
    return Images(torch.from_numpy(pixels), classes)


def _decoded(content: bytes | None, source: str) -> npt.NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(content or b"")) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        # Pillow's message for an unknown format contains only the buffer's address, so it is left out.
        raise RPGError(f"{source}: not a readable image") from error
    if pixels.shape != (SIZE, SIZE, 3):
        height, width = pixels.shape[:2]
        raise RPGError(f"{source}: expected an image of {SIZE} × {SIZE}, found {width} × {height}")
    return pixels


def read_batch_file(path: AnyPath) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels [N, 32, 32, 3] and classes [N] of one of CIFAR-10's own batch files.

    The files are pickles, which torchvision executes. Here the pickle's instructions are only listed, and two
    literals are taken from the list: the string of all pixels and the integers after the key `labels`.

    Raises:
        RPGError: naming the file, if it is not one of CIFAR-10's batches.
    """
    with storage_errors_for(path):
        content = read_regular(path, _MOST_BYTES)
    try:
        pixels, key = b"", ""
        labels: list[object] = []
        for name, value in _literals(content):
            if isinstance(value, bytes):
                key = value.decode("latin-1") if len(value) < 64 else ""
                pixels = max(pixels, value, key=len)
            elif key == "labels" and name in _INTEGERS:
                labels.append(value)
    # `genops` raises ValueError for most files that are no pickle, and these for some.
    except (ValueError, OverflowError, UnicodeError, AttributeError, TypeError) as error:
        raise RPGError(f"{path}: not one of CIFAR-10's batch files: {error}") from error
    each = 3 * SIZE * SIZE
    if not labels or len(pixels) != each * len(labels):
        raise RPGError(
            f"{path}: not one of CIFAR-10's batch files: expected {each} bytes of pixels for each label, "
            f"found {len(pixels)} bytes and {len(labels)} labels"
        )
    planes = np.frombuffer(pixels, np.uint8).reshape(-1, 3, SIZE, SIZE)
    return planes.transpose(0, 2, 3, 1), np.array(labels, np.int64)


def _literals(content: bytes) -> Iterator[tuple[str, object]]:
    """The names and values of a pickle's instructions; strings are bytes, whichever Python wrote them."""
    for instruction, value, _ in pickletools.genops(content):
        # `genops` decodes strings of Python 2 byte by byte.
        text = value.encode("latin-1") if isinstance(value, str) else value
        yield instruction.name, bytes(text) if isinstance(text, bytearray) else text
