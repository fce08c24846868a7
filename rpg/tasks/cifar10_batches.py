"""CIFAR-10's own batch files (`cifar-10-batches-py`, what torchvision downloads), read without running them.

They are pickles, small programs that build objects, and torchvision runs them. Here their instructions are
only listed, and two literals taken from the list: the string of all pixels and the integers after the key
`labels`.
"""

import pickletools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from rpg.errors import RPGError
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath

DIRECTORY = "cifar-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)

_SIZE = 32
_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"}


def read_batch(path: AnyPath) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Pixels [N, 32, 32, 3] and classes [N] of one file.

    Raises:
        RPGError: naming the file, if it is not one of CIFAR-10's batches.
    """
    with storage_errors_for(path), path.open("rb") as file:
        content = file.read()
    try:
        pixels, key = b"", ""
        labels: list[object] = []
        for name, value in _literals(content):
            if isinstance(value, bytes):
                key = value.decode("latin-1") if len(value) < 64 else ""
                pixels = max(pixels, value, key=len)
            elif key == "labels" and name in _INTEGERS:
                labels.append(value)
    # `genops` raises ValueError for most of what is no pickle, and others for some.
    except (ValueError, OverflowError, UnicodeError, AttributeError, TypeError) as error:
        raise RPGError(f"{path}: not one of CIFAR-10's batch files: {error}") from error
    each = 3 * _SIZE * _SIZE
    if not labels or len(pixels) != each * len(labels):
        raise RPGError(
            f"{path}: not one of CIFAR-10's batch files: expected {each} bytes of pixels for each label, "
            f"found {len(pixels)} bytes and {len(labels)} labels"
        )
    planes = np.frombuffer(pixels, np.uint8).reshape(-1, 3, _SIZE, _SIZE)
    return planes.transpose(0, 2, 3, 1), np.array(labels, np.int64)


def _literals(content: bytes) -> Iterator[tuple[str, object]]:
    """Instructions with a value: strings as bytes, whichever Python wrote them, and numbers as they are."""
    for instruction, value, _ in pickletools.genops(content):
        # Strings of Python 2 come decoded byte by byte.
        text = value.encode("latin-1") if isinstance(value, str) else value
        yield instruction.name, bytes(text) if isinstance(text, bytearray) else text
