"""Checkpoints: reading and writing a `state_dict`, without ever executing a pickle.

What a file is, is seen by its content: `.safetensors`, or PyTorch's own (zip and legacy). A directory may be
a checkpoint too: PEFT's adapters and Hugging Face's models. Generated models are always written as
`.safetensors`.
"""

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rpg.collection.adapter import canonical_factors
from rpg.collection.checkpoint_directory import files_of_directory, needed_files, read_config
from rpg.collection.reading import AS_STORED, Reading
from rpg.collection.safetensors_file import LARGEST_HEADER
from rpg.collection.torch_file import LEGACY_MAGIC, ZIP_MAGIC, is_torch_archive, read_torch_file
from rpg.collection.wrappers import unwrapped
from rpg.errors import RPGError, one_line
from rpg.state_dicts import check_entries
from rpg.storage.below import NotOrdinaryError, open_regular
from rpg.storage.files import replacing_file, sha256
from rpg.storage.locations import AnyPath, fetched

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".pth.tar", ".pt.tar")
"""Endings of checkpoint files. What a file is, its content decides."""
ORDER_KEY = "tensor_order"
"""Metadata key of written files: JSON list of tensor names, as safetensors itself forgets their order."""

_REPEATED_BYTES = 2**26
_REPEATED_TIMES = 4
"""How often the values of a storage may be in tensors that differ, such as a matrix and its transpose."""
_CHECKED_VALUES = 2**20
_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class ExaminedCheckpoint:
    """A checkpoint with what `rpg register` needs to know about it."""

    state_dict: dict[str, Tensor]
    left_out: list[str]
    """Names of entries beside the tensors that are no tensors."""
    wrappers: set[str]
    """Wrappers whose marks were removed from the names."""
    ignored: set[str]
    """Patterns of `Reading.ignore` that matched a name."""
    config: dict[str, Any] | None
    """The configuration of a directory, of PEFT or of Hugging Face; None without one."""
    sha256: str = ""


def read_checkpoint(path: AnyPath, reading: Reading = AS_STORED) -> dict[str, Tensor]:
    """Read a `state_dict` on the CPU from a checkpoint file, or a directory of a PEFT adapter or a Hugging
    Face model.

    A PyTorch file may hold the `state_dict` itself, or a dict with one somewhere inside (`read_torch_file`);
    order and tied tensors (shared storage) are kept. `.safetensors` come in the order that `write_checkpoint`
    recorded, or else in natural order of their names (`layers.2` before `layers.10`). Tensors are
    memory-mapped where the format allows it, so reading is cheap until their values are used. A checkpoint
    behind a URI is copied to a temporary file, which lasts as long as its tensors.

    Args:
        path: of the checkpoint.
        reading: what to do with its content, as was decided when a collection was made.

    Raises:
        OtherContentError: if it holds the state of an optimiser or the like.
        RPGError: naming the file, if it is missing, unreadable, empty, truncated or not a checkpoint, or if
            its tensors cannot be read without executing it.
    """
    with fetched(path, needed_files) as local:
        return _examine(local, reading).state_dict


def read_checkpoint_and_sha256(path: AnyPath, reading: Reading = AS_STORED) -> tuple[dict[str, Tensor], str]:
    """The results of `read_checkpoint` and `checkpoint_sha256`; behind a URI, for one transfer."""
    with fetched(path, needed_files) as local:
        return _examine(local, reading).state_dict, _sha256(local)


def examine_checkpoint(path: AnyPath, reading: Reading) -> ExaminedCheckpoint:
    """The result of `read_checkpoint` with all that there is to say about it.

    Raises:
        RPGError: as `read_checkpoint`.
    """
    with fetched(path, needed_files) as local:
        return replace(_examine(local, reading), sha256=_sha256(local))


def looks_like_checkpoint(path: Path) -> bool:
    """Whether a local file begins as checkpoints do, whatever its name is."""
    if path.suffix.lower() == ".distcp" or not path.is_file():
        return False
    try:
        with open_regular(path) as file:
            start = file.read(len(LEGACY_MAGIC))
    except (OSError, NotOrdinaryError):
        return False
    if start.startswith(ZIP_MAGIC):
        return is_torch_archive(path)
    return start.startswith((LEGACY_MAGIC, _GGUF_MAGIC)) or _begins_as_safetensors(start, path)


def has_checkpoint_suffix(path: AnyPath) -> bool:
    """Whether a name ends as those of checkpoint files do."""
    return path.name.lower().endswith(CHECKPOINT_SUFFIXES)


def checkpoint_files(path: Path) -> list[Path]:
    """The files that make up a checkpoint: itself, or a directory's configuration, index and weights."""
    if not path.is_dir():
        return [path]
    files = files_of_directory(path)
    return [file for file in (files.config, files.index, *files.weights) if file is not None]


def checkpoint_sha256(path: AnyPath) -> str:
    """SHA-256 of a checkpoint file; of a directory, that of its files' names and digests.

    Raises:
        RPGError: naming the file, if it cannot be read.
    """
    with fetched(path, needed_files) as local:
        return _sha256(local)


def _sha256(path: Path) -> str:
    try:
        digests = {file.name: sha256(file) for file in checkpoint_files(path)}
    except OSError as error:
        raise RPGError(f"{path}: cannot be read: {error.strerror}") from error
    if len(digests) == 1:
        return next(iter(digests.values()))
    lines = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    return hashlib.sha256(lines.encode()).hexdigest()


def check_finite(state_dict: Mapping[str, Tensor], path: AnyPath) -> None:
    """Check that every value of every floating-point tensor is finite.

    Raises:
        RPGError: naming file and tensor, at the first tensor with NaN or Inf.
    """
    for name, tensor in state_dict.items():
        if not tensor.is_floating_point():
            continue
        # A block at a time, because the check makes copies, and an embedding may be most of the memory.
        blocks = tensor.detach().reshape(-1).split(_CHECKED_VALUES)
        if not all(bool(torch.isfinite(block).all()) for block in blocks):
            nans = sum(int(torch.isnan(block).sum()) for block in blocks)
            infinities = sum(int((~torch.isfinite(block)).sum()) for block in blocks) - nans
            raise RPGError(
                f"{path}: tensor '{name}' holds {nans} NaN and {infinities} Inf; expected finite values"
            )


def write_checkpoint(path: AnyPath, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a `state_dict` as `.safetensors`, as a whole or not at all.

    Tied tensors are written once each, non-contiguous ones contiguously; `load_state_dict(strict=True)`
    takes the result. Equal arguments give equal bytes.

    Raises:
        RPGError: naming the file, if the file system refuses, or a tensor is not an ordinary dense one.
    """
    _check(state_dict, path)
    prepared: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state_dict.items():
        values = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory.
        storage = values.untyped_storage().data_ptr()
        if storage in storages and values.numel():
            values = values.clone()
        storages.add(storage)
        prepared[name] = values
    header = {**metadata, ORDER_KEY: json.dumps(list(prepared))}
    with replacing_file(path) as temporary:
        # Files that safetensors creates may only be read by their owner, whatever the umask is.
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(prepared, temporary, metadata=header)
            temporary.chmod(mode)
        except SafetensorError as error:
            raise RPGError(f"{path}: cannot be written: {one_line(error)}") from error
        _sort_metadata(temporary)


def _examine(path: Path, reading: Reading) -> ExaminedCheckpoint:
    state_dict, left_out, config = _read(path, reading.key)
    ignored: set[str] = set()
    try:
        state_dict, wrappers = unwrapped(state_dict, reading.unwrap)
        for pattern in reading.ignore:
            matching = [name for name in state_dict if fnmatchcase(name, pattern)]
            ignored |= {pattern} if matching else set()
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in matching}
        if not state_dict:
            raise RPGError("the state_dict is empty; expected at least one tensor")
        check_entries(state_dict)
        _check_repeats(state_dict)
        if reading.canonical_factors:
            state_dict = canonical_factors(state_dict, config)
    except RPGError as error:
        raise RPGError(f"{path}: {error}") from error
    return ExaminedCheckpoint(state_dict, left_out, wrappers, ignored, config)


def _read(path: Path, key: str | None) -> tuple[dict[str, Tensor], list[str], dict[str, Any] | None]:
    if not path.is_dir():
        return *_read_file(path, key), None
    files = files_of_directory(path)
    config = None if files.config is None else read_config(files.config)
    if files.parts is None:
        return *_read_file(files.weights[0], key), config
    found: dict[str, Tensor] = {}
    left_out: list[str] = []
    for part in files.weights:
        state_dict, others = _read_file(part, key)
        for name in state_dict:
            if files.parts.get(name) != part.name:
                raise RPGError(f"{part}: tensor '{name}' is unexpected; {files.index} names another file")
        found |= state_dict
        left_out += others
    for name, file in files.parts.items():
        if name not in found:
            raise RPGError(f"{path / file}: tensor '{name}' is missing; {files.index} names it")
    if all(part.suffix == ".safetensors" for part in files.weights):
        found = {name: found[name] for name in sorted(found, key=_natural)}
    return found, left_out, config


def _read_file(path: Path, key: str | None) -> tuple[dict[str, Tensor], list[str]]:
    start = _start(path)
    if start.startswith(_GGUF_MAGIC):
        raise RPGError(
            f"{path}: is a GGUF file, which is made for llama.cpp and mostly quantised; expected the "
            "network's own .safetensors, from which it was converted"
        )
    if start.startswith((ZIP_MAGIC, b"\x80")) and not _begins_as_safetensors(start, path):
        return read_torch_file(path, key)
    if path.suffix.lower() == ".safetensors" or _begins_as_safetensors(start, path):
        return _read_safetensors(path), []
    raise RPGError(f"{path}: truncated or not a PyTorch checkpoint or .safetensors file")


def _begins_as_safetensors(start: bytes, path: Path) -> bool:
    length = int.from_bytes(start[:8], "little")
    return start[8:9] == b"{" and length <= min(LARGEST_HEADER, path.stat().st_size - 8)


def _start(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            start = file.read(len(LEGACY_MAGIC))
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found; expected a checkpoint") from error
    except OSError as error:
        raise RPGError(f"{path}: cannot be read: {error.strerror}") from error
    if not start:
        raise RPGError(f"{path}: is empty (0 bytes); expected a checkpoint")
    return start


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = _in_order(file.keys(), file.metadata() or {})
            return {name: file.get_tensor(name) for name in names}
    # A corrupt header can make the reader fail in any way.
    except Exception as error:
        raise RPGError(f"{path}: truncated or not a .safetensors file: {one_line(error)}") from error


def _in_order(names: list[str], metadata: dict[str, str]) -> list[str]:
    try:
        recorded = json.loads(metadata.get(ORDER_KEY, "null"))
    except ValueError:
        recorded = None
    if (
        isinstance(recorded, list)
        and len(recorded) == len(names)
        and set(names) == {str(n) for n in recorded}
    ):
        return recorded
    return sorted(names, key=_natural)


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts)]


def _check(state_dict: Mapping[str, Tensor], path: AnyPath) -> None:
    if not state_dict:
        raise RPGError(f"{path}: the state_dict is empty; expected at least one tensor")
    try:
        check_entries(state_dict)
    except RPGError as error:
        raise RPGError(f"{path}: {error}") from error


def _check_repeats(state_dict: Mapping[str, Tensor]) -> None:
    """Refuse a small file whose tensors would fill the memory; masks and such may repeat stored values."""
    views: dict[int, set[tuple[object, ...]]] = {}
    sizes: dict[int, int] = {}
    for name, tensor in state_dict.items():
        storage = tensor.untyped_storage()
        size, stored = tensor.numel() * tensor.element_size(), storage.nbytes()
        view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
        known = views.setdefault(storage.data_ptr(), set())
        # Tied tensors are one.
        if view not in known:
            known.add(view)
            sizes[storage.data_ptr()] = sizes.get(storage.data_ptr(), 0) + size
        if size > max(stored, _REPEATED_BYTES):
            raise RPGError(
                f"tensor '{name}' of shape {list(tensor.shape)} repeats {stored} stored bytes to {size}; "
                "expected every value to be stored"
            )
        if sizes[storage.data_ptr()] > max(_REPEATED_TIMES * stored, _REPEATED_BYTES):
            raise RPGError(
                f"tensor '{name}' and others repeat {stored} stored bytes to "
                f"{sizes[storage.data_ptr()]}; expected every value to be stored"
            )


def _sort_metadata(path: Path) -> None:
    # safetensors writes metadata in random order, so that equal models would differ in their bytes.
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(encoded) <= length:
            file.seek(8)
            file.write(encoded.ljust(length))
