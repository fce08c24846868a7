"""Small models, of which a batch holds many: encoded together, and written several at a time."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from rpg.sampling.batch_sampler import Sampled
from rpg.sampling.model_format import EncodedModels, NotFiniteError
from rpg.sampling.request import FinishedModel, Models, Request
from rpg.storage.small_files import write_files

_SMALL_BYTES = 2**20
_BYTES_AT_ONCE = 2**21
_MODELS_AT_ONCE = 8
"""Models that one thread writes while others write the next ones: most of it is waiting for the disk."""


def are_small(request: Request) -> bool:
    """Whether the models of a request may be written whole: small files on the local disk."""
    plan = request.plan
    return plan.format.values.size <= _SMALL_BYTES and isinstance(request.out, Path) and not plan.companions


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
    """Write models of a request; they are on the disk when this returns.

    Raises:
        NotFiniteError: naming file and tensor of a model that is not finite.
        RPGError: naming the file that cannot be written.
    """
    plan, out = request.plan, request.out
    assert isinstance(out, Path)
    root = request.root if isinstance(request.root, Path) else None
    files: list[tuple[str, bytes]] = []
    finished: list[FinishedModel] = []
    for index, content, tensor in zip(models, encoded.contents.numpy(), encoded.not_finite, strict=True):
        path = plan.path(index, out)
        if tensor is not None:
            raise NotFiniteError(path, tensor)
        file = plan.format.values.header(plan.provenance(index)) + content.tobytes()
        digest = hashlib.sha256(file).hexdigest() if request.hashed else None
        files.append((path.name, file))
        finished.append(FinishedModel(index, path, len(file), digest))
    write_files(out, files, root)
    return finished
