"""Checkpoint files: reading and writing a `state_dict`, without ever executing a pickle.

Three forms are read: `.safetensors`, PyTorch's own `.pt`/`.pth` (zip and legacy, tensors only), and the
directories of PEFT's adapters and of Hugging Face's models. Generated models are always written as
`.safetensors`.
"""

import hashlib
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rpg.collection.checkpoint_directory import files_of_directory, needed_files
from rpg.collection.state_dicts import check_entries
from rpg.errors import RPGError, one_line
from rpg.storage.files import replacing_file, sha256
from rpg.storage.locations import AnyPath, fetched

CHECKPOINT_SUFFIXES = (".safetensors", ".pt", ".pth")
NESTED_KEYS = ("state_dict", "model", "model_state_dict")
ORDER_KEY = "tensor_order"
"""Metadata key of written files: JSON list of tensor names, as safetensors itself forgets their order."""

_REFUSED = (
    "holds Python objects besides tensors; RPG never executes a pickle: "
    "save a plain state_dict or .safetensors"
)
_REPEATED_BYTES = 2**26
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"


def read_checkpoint(path: AnyPath) -> dict[str, Tensor]:
    """Read a `state_dict` on the CPU from a checkpoint file, or a directory of a PEFT adapter or a Hugging
    Face model.

    `.pt`/`.pth` may hold the `state_dict` itself or a dict with one of the mappings `state_dict`, `model`,
    `model_state_dict`; order and tied tensors (shared storage) are kept. `.safetensors` come in the order
    that `write_checkpoint` recorded, or else in natural order of their names (`layers.2` before `layers.10`).
    Tensors are memory-mapped where the format allows it, so reading is cheap until their values are used. A
    checkpoint behind a URI is copied to a temporary file, which lasts as long as its tensors.

    Raises:
        RPGError: naming the file, if it is missing, unreadable, empty, truncated, not a checkpoint, or
            holds anything but tensors.
    """
    with fetched(path, needed_files) as local:
        return _read(local)


def read_checkpoint_and_sha256(path: AnyPath) -> tuple[dict[str, Tensor], str]:
    """The results of `read_checkpoint` and `checkpoint_sha256`; behind a URI, for one transfer."""
    with fetched(path, needed_files) as local:
        return _read(local), _sha256(local)


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
        if not bool(torch.isfinite(tensor).all()):
            nans = int(torch.isnan(tensor).sum())
            infinities = int((~torch.isfinite(tensor)).sum()) - nans
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


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_dir():
        return _read_file(path)
    files = files_of_directory(path)
    if files.parts is None:
        return _read_file(files.weights[0])
    found: dict[str, Tensor] = {}
    for part in files.weights:
        state_dict = _read_file(part)
        for name in state_dict:
            if files.parts.get(name) != part.name:
                raise RPGError(f"{part}: tensor '{name}' is unexpected; {files.index} names another file")
        found |= state_dict
    for name, file in files.parts.items():
        if name not in found:
            raise RPGError(f"{path / file}: tensor '{name}' is missing; {files.index} names it")
    if all(part.suffix == ".safetensors" for part in files.weights):
        return {name: found[name] for name in sorted(found, key=_natural)}
    return found


def _read_file(path: Path) -> dict[str, Tensor]:
    _check_readable(path)
    state_dict = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_torch(path)
    _check(state_dict, path)
    _check_repeats(state_dict, path)
    return {name: tensor.detach() for name, tensor in state_dict.items()}


def _check_readable(path: Path) -> None:
    # Opening a FIFO would wait for its writer.
    if path.exists() and not path.is_file() and not path.is_dir():
        raise RPGError(f"{path}: not a regular file; expected a checkpoint")
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found; expected a checkpoint") from error
    except OSError as error:
        raise RPGError(f"{path}: cannot be read: {error.strerror}") from error
    if empty:
        raise RPGError(f"{path}: is empty (0 bytes); expected a checkpoint")


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


def _read_torch(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        magic = file.read(4)
    is_zip = magic == _ZIP_MAGIC
    if not is_zip and not magic.startswith(_PICKLE_MAGIC):
        raise RPGError(f"{path}: truncated or not a PyTorch checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise RPGError(f"{path}: {_REFUSED}") from error
    # A corrupt file can make the reader fail in any way.
    except Exception as error:
        if is_zip and _is_torchscript(path):
            raise RPGError(f"{path}: {_REFUSED}") from error
        raise RPGError(f"{path}: truncated or corrupt; expected a PyTorch checkpoint") from error
    return _state_dict(loaded, path)


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    # A corrupt directory can make the reader fail in any way.
    except Exception:
        return False


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(loaded, Mapping):
        raise RPGError(f"{path}: holds a {type(loaded).__name__}; expected a state_dict")
    nested = [key for key in NESTED_KEYS if isinstance(loaded.get(key), Mapping)]
    if len(nested) > 1:
        raise RPGError(f"{path}: holds {' and '.join(repr(k) for k in nested)}; expected one state_dict")
    if nested:
        loaded = loaded[nested[0]]
    for name in loaded:
        if not isinstance(name, str):
            raise RPGError(f"{path}: key {name!r} is not a tensor name; expected a state_dict")
    return dict(loaded)


def _check(state_dict: Mapping[str, Tensor], path: AnyPath) -> None:
    if not state_dict:
        raise RPGError(f"{path}: the state_dict is empty; expected at least one tensor")
    try:
        check_entries(state_dict)
    except RPGError as error:
        raise RPGError(f"{path}: {error}") from error


def _check_repeats(state_dict: Mapping[str, Tensor], path: AnyPath) -> None:
    """Refuse a small file whose tensors would fill the memory; masks and such may repeat stored values."""
    for name, tensor in state_dict.items():
        size, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if size > max(stored, _REPEATED_BYTES):
            raise RPGError(
                f"{path}: tensor '{name}' of shape {list(tensor.shape)} repeats {stored} stored bytes to "
                f"{size}; expected every value to be stored"
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
