"""Answers made of finished models: a file or a tar with ranges and an ETag, or all of a job as a tar stream.

A model that is a directory is stored as its weights; the companion files, which all models of a generator
share, come from memory.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import IO, NamedTuple

from fastapi import Response
from fastapi.responses import StreamingResponse

from rpg.client.schema import ModelFile
from rpg.collection.companions import Companions
from rpg.errors import RPGError
from rpg.sampling.pack import RECORD, member_header, padded
from rpg.storage.errors import StorageError
from serve.errors import ProblemError

MODEL_TYPE = "application/octet-stream"
TAR_TYPE = "application/x-tar"

_BLOCK = 2**18
_RANGE = re.compile(r"bytes=([0-9]*)-([0-9]*)")
_DIGITS = 18
"""More digits than this are a larger number than any file has bytes."""


class Content(NamedTuple):
    """So many bytes: those of a file, which `source` opens, or themselves."""

    source: Callable[[], IO[bytes]] | bytes
    size: int

    @classmethod
    def of(cls, content: bytes) -> "Content":
        """Bytes in memory."""
        return cls(content, len(content))


class StoredModel(NamedTuple):
    """A finished model on storage: `open` opens the file of its weights, `model` tells of them."""

    file_name: str
    open: Callable[[], IO[bytes]]
    model: ModelFile
    companions: Companions

    @property
    def name(self) -> str:
        """What the model is called among those of its job: a directory, or a file."""
        return self.file_name.removesuffix(".safetensors") if self.companions else self.file_name

    @property
    def files(self) -> dict[str, Content]:
        """Content by name of all that belongs to the model, the weights last."""
        name = self.companions.weights_name if self.companions else self.file_name
        beside = {name: Content.of(content) for name, content in self.companions.files.items()}
        return {**beside, name: Content(self.opened, self.model.bytes)}

    @property
    def entries(self) -> list[tuple[str, Content]]:
        """`files` with the names that they have in a tar of the model."""
        if not self.companions:
            return list(self.files.items())
        return [(f"{self.name}/{name}", content) for name, content in self.files.items()]

    def opened(self) -> IO[bytes]:
        """The file of the weights.

        Raises:
            ProblemError: 404 if it is gone, or what lies there is not the file that was made; 503 if the
                storage refuses.
        """
        try:
            file = self.open()
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise self._gone("is gone from storage") from error
            raise ProblemError(503, f"the file {self.file_name} cannot be read: {error}") from error
        except FileNotFoundError as error:
            raise self._gone("is gone from storage") from error
        except (RPGError, IsADirectoryError) as error:
            raise self._gone("on storage is no regular file") from error
        except OSError as error:
            why = f"the file {self.file_name} cannot be read: {error.strerror}"
            raise ProblemError(503, why, headers={"Retry-After": "5"}) from error
        size = file.seek(0, os.SEEK_END)
        if size != self.model.bytes:
            file.close()
            raise self._gone(f"on storage has {size} bytes, and had {self.model.bytes}")
        return file

    def _gone(self, why: str) -> ProblemError:
        return ProblemError(404, f"the file {self.file_name} {why}")


def model_response(stored: StoredModel, mtime: float, headers: Mapping[str, str], prefix: str) -> Response:
    """A model as one file, or the part of it that the request's `headers` ask for.

    It is the file of weights, or where a model is a directory, a tar of that, whose files are of the time
    `mtime`. `prefix` is put before the model's name.

    Raises:
        ProblemError: 404 if the weights are gone; 416 for a range outside the file.
    """
    if not stored.companions:
        return file_response(stored, stored.file_name, headers, prefix)
    stored.opened().close()
    # All that the bytes depend on, since hashing them would take as long as sending them.
    parts = [stored.model.sha256, stored.name, str(int(mtime)), *stored.companions.digests.items()]
    tag = hashlib.sha256(repr(parts).encode()).hexdigest()
    size, content = tar_size(stored.entries), _tar_contents(stored.entries, int(mtime))
    return _part_response(content, size, tag, headers, f"{prefix}{stored.name}.tar", TAR_TYPE)


def file_response(stored: StoredModel, name: str, headers: Mapping[str, str], prefix: str = "") -> Response:
    """One file of a model, or the part of it that the request's `headers` ask for; its ETag is its SHA-256.

    Raises:
        ProblemError: 404 if the model has no such file, or its weights are gone; 416 for a range outside it.
    """
    files = stored.files
    if name not in files:
        raise ProblemError(404, f"model {stored.model.index} has no file '{name}'; it has {', '.join(files)}")
    digest = stored.companions.digests.get(name, stored.model.sha256)
    return _part_response([files[name]], files[name].size, digest, headers, f"{prefix}{name}", MODEL_TYPE)


def archive_response(models: Sequence[StoredModel], mtime: float, directory: str) -> Response:
    """Models as one uncompressed tar stream, all in a `directory` that it is named after, of time `mtime`."""
    entries = [(f"{directory}/{name}", content) for stored in models for name, content in stored.entries]
    headers = {
        "Content-Length": str(tar_size(entries)),
        "Content-Disposition": f'attachment; filename="{directory}.tar"',
    }
    return StreamingResponse(tar_stream(entries, int(mtime)), 200, headers, TAR_TYPE)


def tar_stream(entries: Sequence[tuple[str, Content]], mtime: int) -> Iterator[bytes]:
    """The blocks of a tar file of `entries`, each with its name, all of the time `mtime`."""
    return _blocks(_tar_contents(entries, mtime), 0, tar_size(entries))


def tar_size(entries: Sequence[tuple[str, Content]]) -> int:
    """Bytes of a tar file of `entries`."""
    return sum(RECORD + padded(content.size) for _, content in entries) + 2 * RECORD


def _tar_contents(entries: Iterable[tuple[str, Content]], mtime: int) -> Iterator[Content]:
    for name, content in entries:
        yield Content.of(member_header(name, content.size, mtime))
        yield content
        yield Content.of(bytes(padded(content.size) - content.size))
    yield Content.of(bytes(2 * RECORD))


def _part_response(
    contents: Iterable[Content], size: int, tag: str, headers: Mapping[str, str], name: str, media_type: str
) -> Response:
    """The `contents` one after the other, or the part of them that the request's `headers` ask for."""
    tag = f'"{tag}"'
    common = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, immutable, max-age=31536000",
        "Content-Disposition": f'attachment; filename="{name}"',
    }
    known = {each.strip().removeprefix("W/") for each in headers.get("if-none-match", "").split(",")}
    if known & {tag, "*"}:
        return Response(status_code=304, headers=common)
    part = _asked_part(headers.get("range"), size) if headers.get("if-range", tag) == tag else None
    start, end = part or (0, size)
    status = 200
    if part is not None:
        status = 206
        common["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    common["Content-Length"] = str(end - start)
    return StreamingResponse(_begun(_blocks(contents, start, end)), status, common, media_type)


def _asked_part(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range of bytes that `header` asks for; None for the whole file.

    A header that names something else than one range of bytes asks for the whole file, as RFC 9110 has it.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or (not found[1] and not found[2]):
        return None
    if not found[1]:
        start, end = max(0, size - _number(found[2])), size
    else:
        start, end = _number(found[1]), min(size, _number(found[2]) + 1 if found[2] else size)
        if found[2] and _number(found[2]) < _number(found[1]):
            return None
    if start >= end:
        raise ProblemError(
            416, f"Range: expected a part of {size} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, end


def _number(digits: str) -> int:
    """What digits of any number say; beyond all sizes of files, some larger number."""
    significant = digits.lstrip("0")
    return int(significant or 0) if len(significant) <= _DIGITS else 10**_DIGITS


def _begun(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """`blocks`, the first of which is read at once, so that a file that is gone is told as a 404."""
    first = next(blocks, b"")

    def rest() -> Iterator[bytes]:
        yield first
        yield from blocks

    return rest()


def _blocks(contents: Iterable[Content], start: int, end: int) -> Iterator[bytes]:
    """The bytes from `start` to `end` of `contents`, one after the other."""
    for content in contents:
        first, last = max(start, 0), min(end, content.size)
        if first < last:
            if isinstance(content.source, bytes):
                yield content.source[first:last]
            else:
                yield from _file_blocks(content.source, first, last)
        start, end = start - content.size, end - content.size
        if end <= 0:
            return


def _file_blocks(source: Callable[[], IO[bytes]], start: int, end: int) -> Iterator[bytes]:
    with source() as file:
        file.seek(start)
        left = end - start
        while left:
            block = file.read(min(_BLOCK, left))
            if not block:
                # The error breaks the connection, so that the caller does not take this for the whole file.
                raise OSError("the file is shorter than it was")
            left -= len(block)
            yield block
