"""The files that torchvision's own data sets consist of, without its loaders for those that are pickles."""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from rpg.errors import RPGError, one_line
from rpg.storage.below import TooLargeError, list_below, path_below, read_below
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath
from rpg.tasks.images.part import MOST_BYTES, Part

_SIZE = 32
"""Side of CIFAR's images."""
_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"}
"""Pickle instructions whose value is an integer."""


@dataclass(frozen=True)
class _Pickled:
    """CIFAR's files, and the key under which they have the classes."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    key: str


_CIFAR = {
    "cifar-10-batches-py": _Pickled(tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "labels"),
    "cifar-100-python": _Pickled(("train",), ("test",), "fine_labels"),
}
_MNIST = ("MNIST", "FashionMNIST")
_MNIST_PREFIX = {"train": "train", "test": "t10k"}
DIRECTORIES = (*_CIFAR, *_MNIST)
"""Names of the directories that torchvision makes."""


def torchvision_part(root: AnyPath, directory: str, part: str) -> Part:
    """The images of torchvision's directory `directory` (one of `DIRECTORIES`) in `root`.

    Args:
        root: what torchvision calls `root`, or the directory itself.
        directory: its name.
        part: `train` or `test`.

    Raises:
        RPGError: naming the file that is missing or damaged.
    """
    inner = "" if root.name == directory else f"{directory}/"
    if directory in _MNIST:
        return _idx_part(root, f"{inner}raw/{_MNIST_PREFIX[part]}")
    files = _CIFAR[directory]
    names = [f"{inner}{name}" for name in (files.train if part == "train" else files.test)]
    read = [read_batch_file(root, name, files.key) for name in names]
    pixels, classes = (np.concatenate(each) for each in zip(*read, strict=True))
    return Part(str(root / PurePosixPath(names[0]).parent), classes, _SIZE, _SIZE, lambda: pixels)


def read_batch_file(
    root: AnyPath, name: str, key: str = "labels"
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels [N, 32, 32, 3] and classes [N] of one of CIFAR's own files.

    The files are pickles, which torchvision executes. Here the pickle's instructions are only listed, and two
    literals are taken from the list: the string of all pixels and the integers after the key of the classes.

    Args:
        root: the directory that the file lies below.
        name: of the file.
        key: of the classes.

    Raises:
        RPGError: naming the file, if it is not one of CIFAR's.
    """
    path = root / name
    content = _content(root, name)
    try:
        pixels, last = b"", ""
        labels: list[object] = []
        for instruction, value in _literals(content):
            if isinstance(value, bytes):
                last = value.decode("latin-1") if len(value) < 64 else ""
                pixels = max(pixels, value, key=len)
            elif last == key and instruction in _INTEGERS:
                labels.append(value)
        classes = np.array(labels, np.int64)
    # `genops` raises ValueError for most files that are no pickle, and these for some.
    except (ValueError, OverflowError, UnicodeError, AttributeError, TypeError) as error:
        raise RPGError(f"{path}: not one of CIFAR's batch files: {one_line(error)[:200]}") from error
    each = 3 * _SIZE * _SIZE
    if not labels or len(pixels) != each * len(labels):
        raise RPGError(
            f"{path}: not one of CIFAR's batch files: expected {each} bytes of pixels for each label, "
            f"found {len(pixels)} bytes and {len(labels)} labels"
        )
    planes = np.frombuffer(pixels, np.uint8).reshape(-1, 3, _SIZE, _SIZE)
    return planes.transpose(0, 2, 3, 1), classes


def _content(root: AnyPath, name: str) -> bytes:
    path = root / name
    try:
        with storage_errors_for(path):
            return read_below(root, name, MOST_BYTES)
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found (collect.images)") from error


def _literals(content: bytes) -> Iterator[tuple[str, object]]:
    """The names and values of a pickle's instructions; strings are bytes, whichever Python wrote them."""
    for instruction, value, _ in pickletools.genops(content):
        # `genops` decodes strings of Python 2 byte by byte.
        text = value.encode("latin-1") if isinstance(value, str) else value
        yield instruction.name, bytes(text) if isinstance(text, bytearray) else text


def _idx_part(root: AnyPath, prefix: str) -> Part:
    """MNIST's files: grey images, which get three equal channels."""
    images = _idx(root, f"{prefix}-images-idx3-ubyte", 3)
    classes = _idx(root, f"{prefix}-labels-idx1-ubyte", 1)
    if len(images) != len(classes):
        raise RPGError(f"{root / prefix}…: {len(images)} images, but {len(classes)} labels")
    source = str(root / PurePosixPath(prefix).parent)
    _, height, width = images.shape
    return Part(
        source, classes.astype(np.int64), height, width, lambda: np.repeat(images[..., None], 3, axis=3)
    )


def _idx(root: AnyPath, name: str, dimensions: int) -> npt.NDArray[np.uint8]:
    # Imported here: it takes seconds, and sets of other kinds do without.
    from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

    path = root / name
    try:
        with storage_errors_for(path):
            parent = list_below(root, str(PurePosixPath(name).parent))
        listed = parent.get(PurePosixPath(name).name)
        if listed is not None and (listed.size or 0) > MOST_BYTES:
            raise TooLargeError(f"{path}: has more than {MOST_BYTES:,} bytes; expected at most so many")
        with path_below(root, name) as local:
            values: npt.NDArray[np.uint8] = read_sn3_pascalvincent_tensor(str(local)).numpy()
    except RPGError:
        raise
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found (collect.images)") from error
    except Exception as error:
        # It checks some things by `assert`, and others not at all.
        raise RPGError(f"{path}: not one of MNIST's files: {one_line(error)[:200]}") from error
    if values.ndim != dimensions or values.dtype != np.uint8:
        raise RPGError(f"{path}: expected bytes in {dimensions} dimensions, found {values.ndim}")
    return values
