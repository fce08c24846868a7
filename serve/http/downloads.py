"""Answers made of finished models: one file with ranges and an ETag, or all of a job as a tar stream."""

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence

from fastapi import Response
from fastapi.responses import StreamingResponse

from rpg.client.schema import ModelFile
from rpg.storage.locations import AnyPath
from serve.errors import ProblemError

MODEL_TYPE = "application/octet-stream"
TAR_TYPE = "application/x-tar"

_BLOCK = 2**18
_TAR_RECORD = 512
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def model_response(path: AnyPath, model: ModelFile, headers: Mapping[str, str], name: str) -> Response:
    """The file of `model` at `path`, or the part of it that the request's `headers` ask for.

    Raises:
        ProblemError: 416 for a range outside the file.
    """
    tag = f'"{model.sha256}"'
    common = {
        "ETag": tag,
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, immutable, max-age=31536000",
        "Content-Disposition": f'attachment; filename="{name}"',
    }
    if tag in (each.strip().removeprefix("W/") for each in headers.get("if-none-match", "").split(",")):
        return Response(status_code=304, headers=common)
    part = _asked_part(headers.get("range"), model.bytes) if headers.get("if-range", tag) == tag else None
    start, end = part or (0, model.bytes)
    status = 200
    if part is not None:
        status = 206
        common["Content-Range"] = f"bytes {start}-{end - 1}/{model.bytes}"
    common["Content-Length"] = str(end - start)
    blocks = _blocks(path, start, end)
    return StreamingResponse(_begun(blocks, path), status, common, MODEL_TYPE)


def archive_response(files: Sequence[tuple[AnyPath, ModelFile, str]], mtime: float, name: str) -> Response:
    """`files` as one uncompressed tar stream; of each: its path, the model in it, its name in the archive."""
    size = sum(_TAR_RECORD + _padded(model.bytes) for _, model, _ in files) + 2 * _TAR_RECORD
    headers = {
        "Content-Length": str(size),
        "Content-Disposition": f'attachment; filename="{name}"',
    }
    return StreamingResponse(tar_stream(files, int(mtime)), 200, headers, TAR_TYPE)


def _asked_part(header: str | None, size: int) -> tuple[int, int] | None:
    """The half-open range of bytes that `header` asks for; None for the whole file.

    A header that names something else than one range of bytes asks for the whole file, as RFC 9110 has it.
    """
    found = _RANGE.fullmatch(header.strip()) if header else None
    if found is None or (not found[1] and not found[2]):
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size
    else:
        start, end = int(found[1]), min(size, int(found[2]) + 1 if found[2] else size)
        if found[2] and int(found[2]) < int(found[1]):
            return None
    if start >= end:
        raise ProblemError(
            416, f"Range: expected a part of {size} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, end


def _begun(blocks: Iterator[bytes], path: AnyPath) -> Iterator[bytes]:
    """`blocks`, the first of which is read at once, so that a file that is gone is told as a 404."""
    try:
        first = next(blocks)
    except StopIteration:
        return iter(())
    except FileNotFoundError:
        raise ProblemError(404, f"the file {path.name} is gone from storage") from None

    def rest() -> Iterator[bytes]:
        yield first
        yield from blocks

    return rest()


def _blocks(path: AnyPath, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        left = end - start
        while left:
            block = file.read(min(_BLOCK, left))
            if not block:
                # The error breaks the connection, so that the caller does not take this for the whole file.
                raise OSError(f"{path}: shorter than it was")
            left -= len(block)
            yield block


def tar_stream(files: Sequence[tuple[AnyPath, ModelFile, str]], mtime: int) -> Iterator[bytes]:
    """The blocks of a tar file that holds `files` (as in `archive_response`), all of the time `mtime`."""
    for path, model, name in files:
        info = tarfile.TarInfo(name)
        info.size, info.mtime = model.bytes, mtime
        # GNU's format, because USTAR has no room for sizes of 8 GiB and more. With names as short as these,
        # its header is one record as well.
        yield info.tobuf(tarfile.GNU_FORMAT)
        yield from _blocks(path, 0, model.bytes)
        yield bytes(_padded(model.bytes) - model.bytes)
    yield bytes(2 * _TAR_RECORD)


def _padded(size: int) -> int:
    return -(-size // _TAR_RECORD) * _TAR_RECORD
