"""Directories that hold one checkpoint: PEFT adapters, and what Hugging Face's libraries save.

A model of Transformers, timm or Diffusers is a configuration beside one file of weights, or beside several
with an index that says which tensor is in which part.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpg.errors import RPGError
from rpg.storage.below import read_regular
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath

ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
INDEX_SUFFIX = ".index.json"
PART = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}(\.safetensors|\.bin)")
"""Name of a part, whose index is named after its groups: `model-00001-of-00002.safetensors`."""
_DISTRIBUTED = ".metadata"
"""The file that says how PyTorch's distributed checkpoints are cut, a pickle."""
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MODEL_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
"""Names of weights, best first: Transformers prefers one safetensors file to parts, and both to pickles."""
_MODEL_KEYS = ("model_type", "architectures", "architecture", "_class_name")
"""Keys of which a model's configuration has one: of Transformers, of timm and of Diffusers."""


@dataclass(frozen=True)
class DirectoryFiles:
    """The files of a checkpoint's directory that say what its tensors are."""

    config: Path | None
    index: Path | None
    weights: list[Path]
    """The file of weights, or the parts that the index names, in the order of their names."""
    parts: dict[str, str] | None
    """The part of every tensor by the index; None without one."""


def index_of(part: re.Match[str]) -> str:
    """Name of the index beside a part, given the match of its name."""
    return f"{part[1]}{part[2]}{INDEX_SUFFIX}"


def is_adapter(path: AnyPath) -> bool:
    """Whether `path` is a directory as PEFT's `save_pretrained` makes it."""
    with storage_errors_for(path):
        return bool((path / ADAPTER_CONFIG).is_file())


def is_checkpoint_directory(path: AnyPath) -> bool:
    """Whether `path` is the directory of one checkpoint, which may lack its weights.

    Raises:
        RPGError: naming the URI, if its storage cannot be reached.
    """
    with storage_errors_for(path):
        if not path.is_dir():
            return False
        names = {child.name for child in path.iterdir()}
    if ADAPTER_CONFIG in names or _DISTRIBUTED in names or _weights_name(names, _MODEL_WEIGHTS) is not None:
        return True
    return MODEL_CONFIG in names and isinstance(path, Path) and _describes_a_model(path / MODEL_CONFIG)


def files_of_directory(path: Path) -> DirectoryFiles:
    """The files of the checkpoint whose directory `path` is; other files beside them are left alone.

    Raises:
        RPGError: naming the directory without weights, the index that is malformed, or the part that is
            missing.
    """
    names = {child.name for child in path.iterdir()}
    if _DISTRIBUTED in names:
        raise RPGError(
            f"{path}: is a sharded checkpoint of torch.distributed.checkpoint; expected a whole one: "
            "python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIRECTORY FILE.pt"
        )
    is_peft = ADAPTER_CONFIG in names
    known = _ADAPTER_WEIGHTS if is_peft else _MODEL_WEIGHTS
    config = path / (ADAPTER_CONFIG if is_peft else MODEL_CONFIG)
    chosen = _weights_name(names, known)
    if chosen is None and config.name in names:
        raise RPGError(f"{path}: has {config.name} but neither {' nor '.join(known[:2])}")
    if chosen is None:
        raise RPGError(
            f"{path}: is a directory without {ADAPTER_CONFIG} or {' or '.join(known[:2])}; expected a "
            "checkpoint file, a PEFT adapter or a directory as Hugging Face's save_pretrained makes it"
        )
    beside = config if config.name in names else None
    if not chosen.endswith(INDEX_SUFFIX):
        return DirectoryFiles(beside, None, [path / chosen], None)
    parts = _read_index(path / chosen)
    for part in sorted(set(parts.values()) - names):
        raise RPGError(f"{path}: '{part}' is missing; {chosen} names it as a part of the checkpoint")
    return DirectoryFiles(beside, path / chosen, [path / part for part in sorted(set(parts.values()))], parts)


def needed_files(names: Collection[str]) -> set[str]:
    """Those of the files below a checkpoint's directory that `files_of_directory` may name."""
    is_peft = ADAPTER_CONFIG in names
    chosen = _weights_name(names, _ADAPTER_WEIGHTS if is_peft else _MODEL_WEIGHTS)
    needed = {ADAPTER_CONFIG if is_peft else MODEL_CONFIG, _DISTRIBUTED} & set(names)
    if chosen is None:
        return needed
    if chosen.endswith(INDEX_SUFFIX):
        suffix = Path(chosen.removesuffix(INDEX_SUFFIX)).suffix
        needed |= {name for name in names if name.endswith(suffix) and "/" not in name}
    return needed | {chosen}


def read_config(path: Path) -> dict[str, Any]:
    """The configuration beside a checkpoint's weights.

    Raises:
        RPGError: naming the file that holds no JSON object.
    """
    content = _read_json(path)
    if not isinstance(content, dict):
        raise RPGError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _weights_name(names: Collection[str], known: tuple[str, ...]) -> str | None:
    choices = (choice for name in known for choice in (name, name + INDEX_SUFFIX))
    return next((choice for choice in choices if choice in names), None)


def _describes_a_model(config: Path) -> bool:
    try:
        content = json.loads(read_regular(config))
    except (RPGError, OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and any(key in content for key in _MODEL_KEYS)


def _read_index(path: Path) -> dict[str, str]:
    content = _read_json(path)
    parts = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or not parts:
        raise RPGError(f"{path}: weight_map: expected the file of every tensor")
    for tensor, part in parts.items():
        if not isinstance(part, str) or Path(part).name != part or "\0" in part:
            raise RPGError(f"{path}: '{tensor:.80}': expected a file beside the index, got {part!r:.80}")
    return parts


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_regular(path))
    except OSError as error:
        raise RPGError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RPGError(f"{path}: not valid JSON: {error}") from error
