"""`.safetensors` files, written or checked piece by piece, so that no model is held in memory.

The format lets every tensor's place be known beforehand: an 8-byte length, a JSON header, the raw values.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

LARGEST_HEADER = 100_000_000
"""The longest header that the reference implementation of the format reads."""
_DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class SafetensorsHeader:
    """The beginning of a file, and what follows it.

    Attributes:
        content: all bytes before the first value.
        starts: where each tensor's values begin in the file, by name, in their order there.
        file_size: bytes of the whole file.
    """

    content: bytes
    starts: Mapping[str, int]
    file_size: int

    @classmethod
    def of(
        cls, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
    ) -> "SafetensorsHeader":
        """The header of a file with these tensors, of which dtype and shape are given by name."""
        values = SafetensorsValues.of(tensors)
        content = values.header(metadata)
        starts = {name: len(content) + offset for name, offset in values.offsets.items()}
        return cls(content, starts, len(content) + values.size)


@dataclass(frozen=True)
class SafetensorsValues:
    """What files of equal tensors have in common: all but their metadata.

    Attributes:
        offsets: where each tensor's values begin behind the header, by name, in their order there.
        size: bytes behind the header.
    """

    offsets: Mapping[str, int]
    size: int
    _listed: str
    """The tensors as the header's JSON lists them."""

    @classmethod
    def of(cls, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> "SafetensorsValues":
        """The values of files with these tensors, of which dtype and shape are given by name."""
        listed: dict[str, object] = {}
        offsets: dict[str, int] = {}
        end = 0
        # Wide types first keeps every tensor aligned to its element size.
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            size = prod(shape) * dtype.itemsize
            listed[name] = {
                "dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [end, end + size]
            }  # fmt: skip
            offsets[name] = end
            end += size
        return cls(offsets, end, json.dumps(listed)[1:])

    def header(self, metadata: Mapping[str, str]) -> bytes:
        """All bytes before the first value of a file with this metadata."""
        first = f'{{"__metadata__": {json.dumps(dict(metadata))}'
        text = (f"{first}, {self._listed}" if self.offsets else first + self._listed).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def read_metadata(file: IO[bytes]) -> tuple[dict[str, str], int]:
    """The metadata and the size of a file that is open at its beginning, and whole.

    Raises:
        ValueError: saying why it is not: it has no header, or another size than its header says.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(LARGEST_HEADER, size - 8):
        raise ValueError("truncated or not a .safetensors file")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        said = 8 + length + max((each["data_offsets"][1] for each in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError("its header is damaged") from None
    if said != size:
        raise ValueError(f"its header says {said} bytes, and it has {size}")
    if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
        raise ValueError("its metadata are no texts")
    return metadata, size


def write_tensors(path: Path, header: SafetensorsHeader, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a whole file, given the values of each of the header's tensors, in any order."""
    with path.open("wb") as file:
        file.write(header.content)
        file.truncate(header.file_size)
        for name, tensor in tensors:
            file.seek(header.starts[name])
            file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
