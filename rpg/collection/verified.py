"""Verifying that shards have the digests in their manifest: each file is read once, and again when it
changes.

`.verified.json` beside the shards records size, modification time and inode of every file whose SHA-256 was
right, so that tens of gigabytes need not be read each time they are opened. Damage that changes none of the
three is found by `ShardedCollection.verify` (`rpg inspect --verify`), which reads everything.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rpg.collection.manifest import MANIFEST_FILE
from rpg.collection.shard_file import ShardInfo
from rpg.errors import RPGError
from rpg.storage.below import open_below
from rpg.storage.files import read_json, sha256_of, write_json
from rpg.storage.locations import AnyPath

VERIFIED_FILE = ".verified.json"
_THREADS = 8

Mark = list[int | str]


def damage(directory: AnyPath, shards: Sequence[ShardInfo], again: bool = False) -> dict[str, str]:
    """The shards that are missing or damaged, by file name, each with a line that says why.

    Behind a URI only sizes are compared, since reading would fetch everything.

    Args:
        directory: of the shards.
        shards: what the manifest says of them.
        again: read all files, even those that were verified before.
    """
    found = {shard.file: _wrong_size(directory, shard) for shard in shards}
    remembered = {} if again else _remembered(directory)
    local = isinstance(directory, Path)
    marks = {shard.file: _mark(directory, shard) for shard in shards if local and not found[shard.file]}
    unread = [s for s in shards if s.file in marks and remembered.get(s.file) != marks[s.file]]
    if unread:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            for shard, wrong in zip(
                unread, pool.map(lambda shard: _wrong_content(directory, shard), unread), strict=True
            ):
                found[shard.file] = wrong
        # If the record cannot be written, the next call reads the files again.
        with suppress(RPGError):
            write_json(directory / VERIFIED_FILE, {n: mark for n, mark in marks.items() if not found[n]})
    return {name: wrong for name, wrong in found.items() if wrong}


def remember(directory: AnyPath, shards: Sequence[ShardInfo]) -> None:
    """Record that these shards, which were just written, are verified."""
    with suppress(RPGError, OSError):
        write_json(directory / VERIFIED_FILE, {shard.file: _mark(directory, shard) for shard in shards})


def _wrong_size(directory: AnyPath, shard: ShardInfo) -> str:
    path = directory / shard.file
    try:
        size = path.stat().st_size
    except OSError:
        return f"{path}: not found; expected a shard that {MANIFEST_FILE} names"
    if size == shard.bytes:
        return ""
    says = "cut short" if size < shard.bytes else "too long"
    return f"{path}: {says}: expected {shard.bytes} bytes, found {size}"


def _wrong_content(directory: AnyPath, shard: ShardInfo) -> str:
    path = directory / shard.file
    try:
        with open_below(directory, shard.file) as file:
            found = sha256_of(file)
    except RPGError as error:
        return str(error)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    return "" if found == shard.sha256 else f"{path}: damaged: its SHA-256 is not the one in {MANIFEST_FILE}"


def _mark(directory: AnyPath, shard: ShardInfo) -> Mark:
    status = (directory / shard.file).stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino, shard.sha256]


def _remembered(directory: AnyPath) -> dict[str, Any]:
    try:
        content = read_json(directory / VERIFIED_FILE, "verified shards", root=directory)
    except RPGError:
        return {}
    return content if isinstance(content, dict) else {}
