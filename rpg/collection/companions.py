"""Companion files: what lies beside the weights in a model's directory, and is needed to load the model.

PEFT, Transformers and timm save a model as a directory: one file of weights, the configuration that says how
to build the network, and for language models the tokenizer. The companions of a collection are those of its
first training checkpoint. They are part of its layout, and every generated model has them beside its weights,
so that it loads where the originals did.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rpg.collection.checkpoint_directory import ADAPTER_CONFIG, MODEL_CONFIG
from rpg.errors import RPGError
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import replacing_file
from rpg.storage.locations import AnyPath

COMPANIONS_DIRECTORY = "companions"
"""Where shards and generators keep the companions of the models."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MODEL_WEIGHTS = "model.safetensors"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
MOST_BYTES = 64 * 2**20
"""Of all companions together: the largest tokenizers have half of this."""
_DIFFUSERS_KEY = "_class_name"
_CACHED_MODEL, _SNAPSHOTS, _BLOBS = "models--", "snapshots", "blobs"
"""Hugging Face's cache: `models--ORG--NAME/snapshots/REVISION/config.json` links into the model's `blobs`."""
COMPANION_NAMES = frozenset(
    {
        ADAPTER_CONFIG, MODEL_CONFIG, "generation_config.json",
        "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "chat_template.jinja", "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "bpe.codes",
        "dict.txt", "normalizer.json", "tokenizer.model", "spiece.model", "spm.model",
        "sentencepiece.bpe.model", "source.spm", "target.spm", "tekken.json",
    }
)  # fmt: skip
"""The files that travel with a model. All others stay where they are: an original's README and the state of
its training are not true of generated models, code is never run, and whatever else is there is private."""


@dataclass(frozen=True)
class Companions:
    """The companion files of a model; empty, and false, for a model that is one file.

    Attributes:
        files: content by name, in the order of names.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.files)

    def weights_path(self, model: AnyPath) -> AnyPath:
        """The file of a model's weights: in its directory, or the model itself where it is one file."""
        return model / self.weights_name if self else model

    @cached_property
    def weights_name(self) -> str:
        """The name that loaders expect of a single file of weights beside these files."""
        if ADAPTER_CONFIG in self.files:
            return ADAPTER_WEIGHTS
        try:
            is_diffusers = _DIFFUSERS_KEY in json.loads(self.files[MODEL_CONFIG])
        except (KeyError, TypeError, ValueError, RecursionError):
            is_diffusers = False
        return DIFFUSERS_WEIGHTS if is_diffusers else MODEL_WEIGHTS

    @cached_property
    def digests(self) -> dict[str, str]:
        """Hexadecimal SHA-256 of each file, by name."""
        return {name: hashlib.sha256(content).hexdigest() for name, content in self.files.items()}

    def are_in(self, directory: AnyPath) -> bool:
        """Whether all of them are in `directory`."""
        if not self.files:
            return True
        with storage_errors_for(directory):
            if not directory.is_dir():
                return False
            there = [path for path in directory.iterdir() if path.name in self.files and path.is_file()]
            return len(there) == len(self.files) and all(
                path.stat().st_size == len(self.files[path.name])
                and path.read_bytes() == self.files[path.name]
                for path in there
            )

    def write(self, directory: AnyPath) -> None:
        """Write the files into `directory`, each as a whole or not at all.

        Raises:
            RPGError: naming the file that cannot be written.
        """
        for name, content in self.files.items():
            with replacing_file(directory / name) as temporary:
                temporary.write_bytes(content)


def companions_of(checkpoint: AnyPath, root: AnyPath | None = None) -> Companions:
    """The files beside the weights of a checkpoint; none for one that is a file.

    A link stands for the content of the file that it leads to, as in the snapshots of Hugging Face's cache.
    It may lead to a place below `root`, or into the `blobs` of the model whose snapshot the checkpoint is.

    Args:
        checkpoint: file or directory.
        root: directory of the collection; None: the checkpoint itself.

    Raises:
        RPGError: naming the file that is a link to another place, no regular file, or cannot be read; or if
            they are more than `MOST_BYTES`.
    """
    with storage_errors_for(checkpoint):
        names = {path.name for path in checkpoint.iterdir()} if checkpoint.is_dir() else set()
    if names.isdisjoint((ADAPTER_CONFIG, MODEL_CONFIG)):
        return Companions()
    return _read(checkpoint, names & COMPANION_NAMES, checkpoint if root is None else root)


def companions_in(directory: AnyPath, digests: Any, source: str) -> Companions:
    """The companions in `directory` that have these digests, by name; other files are passed over.

    Raises:
        RPGError: naming `source` if it holds no such digests, or the file that is missing or another one.
    """
    if not isinstance(digests, dict) or not set(digests) <= COMPANION_NAMES:
        raise RPGError(f"{source}: companions: expected digests of companion files, got {digests!r:.200}")
    companions = _read(directory, set(digests), directory)
    for name, digest in companions.digests.items():
        if digest != digests[name]:
            raise RPGError(f"{directory / name}: not the companion file that {source} names")
    return companions


def _read(directory: AnyPath, names: set[str], root: AnyPath) -> Companions:
    files: dict[str, bytes] = {}
    room = MOST_BYTES
    for name in sorted(names):
        path = directory / name
        try:
            with storage_errors_for(path):
                files[name] = _content(path, room, root)
        except OSError as error:
            raise RPGError(f"{path}: cannot be read: {error.strerror}") from error
        room -= len(files[name])
    return Companions(files)


def _content(path: AnyPath, room: int, root: AnyPath) -> bytes:
    """The bytes of a file that may have at most `room`."""
    if not isinstance(path, Path):
        _check_room(path, path.stat().st_size, room)
        return path.read_bytes()
    target = _target(path, root) if path.is_symlink() else path
    # Opening a FIFO would wait for its writer, and the file may be replaced by a link meanwhile.
    with os.fdopen(os.open(target, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise RPGError(f"{path}: not a regular file; expected one, as it becomes part of every model")
        _check_room(path, status.st_size, room)
        return file.read(room)


def _target(link: Path, root: AnyPath) -> Path:
    """The file that a link leads to, if it lies where the files of a model may lie.

    Another link could make any file of this machine part of every generated model.
    """
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise RPGError(f"{link}: is a link to nothing; expected a regular file") from error
    places = [root.resolve()] if isinstance(root, Path) else []
    snapshot = link.parent.resolve()
    for directory in (snapshot, *snapshot.parents):
        if directory.parent.name == _SNAPSHOTS and directory.parent.parent.name.startswith(_CACHED_MODEL):
            places.append(directory.parent.parent / _BLOBS)
    if not any(target.is_relative_to(place) for place in places):
        raise RPGError(
            f"{link}: is a link to {target}; expected a regular file, or a link to one in the collection or "
            "in the model's own blobs, as it becomes part of every model"
        )
    return target


def _check_room(path: AnyPath, size: int, room: int) -> None:
    if size > room:
        raise RPGError(
            f"{path}: the files beside the weights have more than {MOST_BYTES // 2**20} MiB; expected what "
            "every generated model can have a copy of"
        )
