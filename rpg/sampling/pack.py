"""Many small models in one file: an uncompressed tar of their `.safetensors` files.

A file of its own costs a small model more than its making: on a disk it is made, synced and renamed, behind a
URI it is a request. Every other program reads tar files, and where a member lies is known when it is written,
so that models are read one by one from a pack without unpacking it.
"""

import io
import os
import secrets
import tarfile
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple

from rpg.storage.files import replacing_file
from rpg.storage.locations import AnyPath

PACK_PATTERN = r"pack_[0-9]{6,18}_[0-9a-f]{8}\.tar"
"""What matches the names of packs (`pack_name`)."""
RECORD = tarfile.BLOCKSIZE
"""Headers and contents begin at multiples of so many bytes."""


class Member(NamedTuple):
    """A file in a pack, and where its content lies."""

    name: str
    offset: int
    size: int


def pack_name(model: int) -> str:
    """A new name for a pack whose first model has this index in its job; another one at each call."""
    return f"pack_{model:06d}_{secrets.token_hex(4)}.tar"


def write_pack(
    path: AnyPath, files: Sequence[tuple[str, bytes]], root: AnyPath | None = None
) -> list[Member]:
    """Write a pack of files, each with its name; it is on the disk, or behind its URI, when this returns.

    Args:
        path: of the pack.
        files: the name of each, of at most 100 bytes, and what it holds.
        root: a directory that `path` lies below; nothing outside of it is written then.

    Raises:
        RPGError: naming the pack, if it cannot be written; there is none then.
    """
    members: list[Member] = []
    offset = 0
    with replacing_file(path, root=root) as temporary, temporary.open("wb") as pack:
        for name, content in files:
            pack.write(member_header(name, len(content)))
            pack.write(content)
            pack.write(bytes(-len(content) % RECORD))
            members.append(Member(name, offset + RECORD, len(content)))
            offset += RECORD + padded(len(content))
        pack.write(bytes(2 * RECORD))
    return members


def member_header(name: str, size: int, mtime: int = 0) -> bytes:
    """The record before the content of a tar's member."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = size, mtime
    # GNU's format, because USTAR has no room for sizes of 8 GiB and more. With names as short as these, its
    # header is one record as well.
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(size: int) -> int:
    """Bytes that a member's content of `size` bytes takes."""
    return -(-size // RECORD) * RECORD


def members_of(pack: IO[bytes]) -> Iterator[Member]:
    """The files in a pack that is open at its beginning, as far as it is whole."""
    end = pack.seek(0, os.SEEK_END)
    at = 0
    while at + RECORD <= end:
        pack.seek(at)
        try:
            info = tarfile.TarInfo.frombuf(pack.read(RECORD), "utf-8", "strict")
        # A header may be damaged in any way, and nothing behind it can be found.
        except (tarfile.HeaderError, ValueError):
            return
        at += RECORD
        if not info.isreg() or not 0 <= info.size <= end - at:
            return
        yield Member(info.name, at, info.size)
        at += padded(info.size)


class MemberFile(io.RawIOBase):
    """A part of a file, read like a file of its own."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        """Read `size` bytes of `file` from `offset` on, or as many of them as there are."""
        self._file = file
        self._start = offset
        self._size = max(0, min(size, file.seek(0, os.SEEK_END) - offset))
        self._at = 0

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the part."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: object) -> int:
        """Read the next bytes."""
        target = memoryview(buffer)[: max(0, self._size - self._at)]  # type: ignore[arg-type]
        self._file.seek(self._start + self._at)
        content = self._file.read(len(target))
        target[: len(content)] = content
        self._at += len(content)
        return len(content)

    def close(self) -> None:
        """Close the file as well."""
        self._file.close()
        super().close()
