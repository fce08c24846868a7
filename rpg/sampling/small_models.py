"""Small models, of which a batch holds many: encoded together, and written several at a time."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from rpg.sampling.batch_sampler import Sampled
from rpg.sampling.model_format import EncodedModels, NotFiniteError
from rpg.sampling.pack import pack_name, write_pack
from rpg.sampling.request import FinishedModel, Models, Request, SmallFile
from rpg.storage.small_files import write_files

_SMALL_BYTES = 2**20
_BYTES_AT_ONCE = 2**21
_PACK_BYTES = 2**23
"""A pack has at least so many bytes, unless it has the last models that were asked for."""
_MODELS_AT_ONCE = 8
"""Models that one thread writes while others write the next ones: most of it is waiting for the disk."""


def are_small(request: Request) -> bool:
    """Whether a request's models may be written whole: into packs, or as small files on the local disk."""
    plan = request.plan
    is_small = plan.format.values.size <= _SMALL_BYTES and not plan.companions
    return is_small and (request.packed or isinstance(request.out, Path))


def encode(
    models: Sequence[Models], sampled: Sampled, first_row: int
) -> Iterator[tuple[Request, Sequence[int], EncodedModels]]:
    """Encode small models of a batch, whose rows in it begin at `first_row`.

    Yields:
        Some models of one request at a time: as many as one thread is to write.
    """
    # Decoding many at once takes little longer than decoding one. Jobs that want another dtype are rare.
    for _, some in groupby(models, key=lambda each: each.request.plan.dtype):
        group = list(some)
        form = group[0].request.plan.format
        rows = slice(first_row, first_row + sum(len(each.indices) for each in group) * form.layout.tokens)
        encoded = form.encode(sampled.models(rows, form.layout))
        first_row, start = rows.stop, 0
        count = max(1, min(_MODELS_AT_ONCE, _BYTES_AT_ONCE // max(1, form.values.size)))
        for request, indices in group:
            for i in range(0, len(indices), count):
                part = indices[i : i + count]
                yield request, part, encoded[start : start + len(part)]
                start += len(part)


def write(request: Request, models: Sequence[int], encoded: EncodedModels) -> list[FinishedModel]:
    """Write models of a request: each into its file, or with others into a pack once there are enough.

    Returns:
        Those that are on the disk now. With packs, models of earlier calls may be among them.

    Raises:
        NotFiniteError: naming file and tensor of a model that is not finite.
        RPGError: naming the file that cannot be written.
    """
    plan, out = request.plan, request.out
    files: list[SmallFile] = []
    for model, content, tensor in zip(models, encoded.contents.numpy(), encoded.not_finite, strict=True):
        path = plan.path(model, out)
        if tensor is not None:
            raise NotFiniteError(path, tensor)
        file = plan.format.values.header(plan.provenance(model)) + content.tobytes()
        files.append(SmallFile(model, path.name, file))
    if request.packed:
        files = request.gathered(files, _PACK_BYTES)
        if not files:
            return []
        path = out / pack_name(files[0].model)
        members = write_pack(path, [(file.name, file.content) for file in files], request.root)
        return [
            FinishedModel(file.model, path, len(file.content), _digest(request, file), member.offset)
            for file, member in zip(files, members, strict=True)
        ]
    assert isinstance(out, Path)
    root = request.root if isinstance(request.root, Path) else None
    write_files(out, [(file.name, file.content) for file in files], root)
    return [
        FinishedModel(file.model, out / file.name, len(file.content), _digest(request, file))
        for file in files
    ]


def _digest(request: Request, file: SmallFile) -> str | None:
    return hashlib.sha256(file.content).hexdigest() if request.hashed else None
