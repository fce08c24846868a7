"""Collections: checkpoints of one architecture, listed in `collection.json` beside them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any

from torch import Tensor

from rpg.collection.checkpoint import checkpoint_sha256, read_checkpoint, read_checkpoint_and_sha256
from rpg.collection.reading import AS_STORED, Reading
from rpg.config import Split
from rpg.errors import RPGError
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import fits_file_systems, is_float32, is_number, is_storable, read_json, write_json
from rpg.storage.locations import AnyPath
from rpg.text_encoder import ENCODER_DIRECTORY

COLLECTION_FILE = "collection.json"
VERSION = 1
_MOST_BYTES = 2**30
"""Of `collection.json`: the embeddings of ten thousand descriptions take 100 MB."""
FAMILY = "family"
"""Key of the architecture that names the task family of a collection's networks (`rpg.tasks.families`)."""
LARGEST_STATE = 2**31 - 1
"""The largest permutation state. A state may be a seed, which is kept unchanged."""
SPLITS = tuple(split.value for split in Split)
"""Generators learn only from `train`; settings are chosen by `validation`; the report uses `heldout`."""


@dataclass
class Entry:
    """One checkpoint of a collection."""

    file: str
    """Path of the checkpoint relative to the collection's directory, with forward slashes."""
    sha256: str
    """What `rpg.collection.checkpoint.checkpoint_sha256` returns for the checkpoint."""
    condition: list[float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    split: str = "train"
    description: str | None = None
    """The text whose embedding the condition is."""
    state: int | None = None
    """The permutation state: any number, equal for checkpoints whose training made the same random choices,
    such as the order of the data."""


_OPTIONAL = ("description", "state")
"""Fields of an entry that the file leaves out if they are None."""


class Collection:
    """Checkpoints of one architecture with their conditions, metrics and splits."""

    def __init__(
        self,
        root: AnyPath,
        architecture: dict[str, Any],
        entries: Sequence[Entry],
        encoder: str | None = None,
        reading: Reading = AS_STORED,
    ) -> None:
        """Describe the checkpoints below `root`.

        Args:
            root: directory or URI of the collection.
            architecture: says how to build the network, if that is known; else empty.
            entries: one for each checkpoint.
            encoder: digest of the text encoder in `encoder_directory` that embedded the descriptions
                (`rpg.text_encoder`); None if conditions come from elsewhere.
            reading: what is done to the content of every checkpoint when it is read.

        Raises:
            RPGError: if an entry, `architecture.family` or `encoder` is invalid, a file is listed twice, or
                conditions differ in width.
        """
        self.root = root
        self.architecture = architecture
        self.encoder = encoder
        self.reading = reading
        self.entries = list(entries)
        self._names: frozenset[str] | None = None
        self._validate()

    @classmethod
    def load(cls, path: AnyPath) -> "Collection":
        """Read a collection from its directory or URI, or from its `collection.json`.

        Raises:
            RPGError: if the file is missing, is of another version, or does not describe a collection.
        """
        with storage_errors_for(path):
            is_file = path.name == COLLECTION_FILE and not path.is_dir()
        path = path if is_file else path / COLLECTION_FILE
        what = "a collection (`rpg register` makes one)"
        content = read_json(path, what, most_bytes=_MOST_BYTES)
        if not isinstance(content, dict):
            raise RPGError(f"{path}: expected a JSON object, found {type(content).__name__}")
        if content.get("version") != VERSION:
            raise RPGError(f"{path}: version: expected {VERSION}, got {content.get('version')!r}")
        keys = {"version", "architecture", "entries"}
        _check_keys(content, keys | {"encoder", "reading"}, keys, str(path))
        architecture, entries = content["architecture"], content["entries"]
        if not isinstance(architecture, dict):
            raise RPGError(f"{path}: architecture: expected an object, got {architecture!r}")
        if not isinstance(entries, list):
            raise RPGError(f"{path}: entries: expected a list, got {entries!r}")
        return cls(
            path.parent,
            architecture,
            [_entry(e, f"{path}: entry {i}") for i, e in enumerate(entries)],
            content.get("encoder"),
            Reading.from_json(content.get("reading", {}), f"{path}: reading"),
        )

    def save(self) -> None:
        """Write `collection.json`, as a whole or not at all."""
        self._validate()
        write_json(
            self.root / COLLECTION_FILE,
            {
                "version": VERSION,
                "architecture": self.architecture,
                **({} if self.encoder is None else {"encoder": self.encoder}),
                **({} if self.reading == AS_STORED else {"reading": self.reading.to_json()}),
                "entries": [_plain(entry) for entry in self.entries],
            },
        )

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def condition_width(self) -> int | None:
        """Numbers in a condition; None for a collection without conditions."""
        if not self.entries or self.entries[0].condition is None:
            return None
        return len(self.entries[0].condition)

    @property
    def encoder_directory(self) -> AnyPath:
        """Where the text encoder is, if the conditions came from one."""
        return self.root / ENCODER_DIRECTORY

    @property
    def splits(self) -> dict[str, list[Entry]]:
        """The entries of each split, in order; a split without entries has an empty list."""
        return {split: [e for e in self.entries if e.split == split] for split in SPLITS}

    @property
    def descriptions(self) -> dict[tuple[float, ...], str]:
        """The texts that conditions stand for, by condition; empty for a collection without descriptions."""
        return {
            tuple(entry.condition): entry.description
            for entry in reversed(self.entries)
            if entry.condition is not None and entry.description is not None
        }

    def tasks(self, split: str) -> list[list[float]]:
        """The conditions of a split's entries, each once, in order.

        A condition that `train` has too counts for `train` only, since generators have learned it.
        """
        splits = self.splits
        trained, own = (
            dict.fromkeys(tuple(e.condition) for e in splits[name] if e.condition is not None)
            for name in ("train", split)
        )
        return [list(task) for task in own if split == "train" or task not in trained]

    def lightened(self, entries: Sequence[Entry]) -> "Collection":
        """The collection with these entries only, to be sent to workers that read checkpoints."""
        return Collection(self.root, {}, entries, reading=self.reading)

    def path(self, entry: Entry) -> AnyPath:
        """Where the entry's checkpoint is."""
        return self.root / entry.file

    def read(self, entry: Entry) -> dict[str, Tensor]:
        """Read an entry's checkpoint.

        Raises:
            RPGError: naming the file, if it cannot be read or its tensor names differ from those of the first
                checkpoint.
        """
        return self._checked_names(entry, self._read(entry))

    def read_checked(self, entry: Entry) -> dict[str, Tensor]:
        """Read an entry's checkpoint and check that it is the one that was registered, in one transfer.

        Raises:
            RPGError: naming the file, if `check` or `read` would raise one.
        """
        state_dict, found = read_checkpoint_and_sha256(self.path(entry), self.reading)
        self._check_sha256(entry, found)
        return self._checked_names(entry, state_dict)

    def check(self, entry: Entry) -> None:
        """Check that an entry's checkpoint is the one that was registered.

        Raises:
            RPGError: if it is missing or its SHA-256 differs.
        """
        self._check_sha256(entry, checkpoint_sha256(self.path(entry)))

    def _read(self, entry: Entry) -> dict[str, Tensor]:
        return read_checkpoint(self.path(entry), self.reading)

    def _checked_names(self, entry: Entry, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._names is None:
            first = self.entries[0]
            self._names = frozenset(state_dict if entry is first else self._read(first))
        different = sorted(self._names.symmetric_difference(state_dict))
        if different:
            says = "is missing" if different[0] in self._names else "is not expected"
            raise RPGError(
                f"{self.path(entry)}: tensor '{different[0]}' {says}; "
                f"expected the names of {self.path(self.entries[0])}"
            )
        return state_dict

    def _check_sha256(self, entry: Entry, found: str) -> None:
        if found != entry.sha256:
            raise RPGError(
                f"{self.path(entry)}: changed since it was registered: expected sha256 {entry.sha256}, "
                f"got {found}"
            )

    def _validate(self) -> None:
        source = self.root / COLLECTION_FILE
        family = self.architecture.get(FAMILY, "")
        if not isinstance(family, str):
            raise RPGError(f"{source}: architecture.family: expected text, got {family!r:.80}")
        if self.encoder is not None and not (
            isinstance(self.encoder, str) and re.fullmatch("[0-9a-f]{64}", self.encoder)
        ):
            raise RPGError(f"{source}: encoder: expected 64 hexadecimal digits, got {self.encoder!r:.80}")
        seen: set[str] = set()
        for entry in self.entries:
            where = f"{source}: {entry.file!r}"
            _check_entry(entry, where)
            if entry.file in seen:
                raise RPGError(f"{where}: listed twice")
            seen.add(entry.file)
        if not self.entries:
            return
        first = self.entries[0]
        for entry in self.entries:
            if (entry.state is None) != (first.state is None):
                raise RPGError(
                    f"{source}: '{entry.file}': state: expected a number for all checkpoints or for none, "
                    f"got {entry.state} here and {first.state} for '{first.file}'"
                )
            if _width(entry) != _width(first):
                raise RPGError(
                    f"{source}: '{entry.file}': expected {_described(first)} as '{first.file}' has, "
                    f"got {_described(entry)}"
                )


def _width(entry: Entry) -> int | None:
    return None if entry.condition is None else len(entry.condition)


def _described(entry: Entry) -> str:
    width = _width(entry)
    return "no condition" if width is None else f"a condition of width {width}"


def _plain(entry: Entry) -> dict[str, Any]:
    values = {f.name: getattr(entry, f.name) for f in fields(entry)}
    return {key: value for key, value in values.items() if key not in _OPTIONAL or value is not None}


def _entry(value: Any, where: str) -> Entry:
    if not isinstance(value, dict):
        raise RPGError(f"{where}: expected an object, got {value!r}")
    _check_keys(value, {f.name for f in fields(Entry)}, {"file", "sha256"}, where)
    return Entry(**value)


def _check_keys(value: dict[str, Any], known: set[str], required: set[str], where: str) -> None:
    if unknown := sorted(set(value) - known):
        raise RPGError(f"{where}: unknown key '{unknown[0]}'; expected {', '.join(sorted(known))}")
    if missing := sorted(required - set(value)):
        raise RPGError(f"{where}: key '{missing[0]}' is missing")


def _check_entry(entry: Entry, where: str) -> None:
    if not isinstance(entry.file, str) or not _stays_inside(entry.file):
        raise RPGError(f"{where}: file: expected a relative path that stays inside the collection")
    if not fits_file_systems(entry.file):
        raise RPGError(f"{where[:200]}: file: expected at most 2048 bytes, and 255 in each name")
    if not isinstance(entry.sha256, str):
        raise RPGError(f"{where}: sha256: expected text, got {entry.sha256!r}")
    if entry.condition is not None and not (
        isinstance(entry.condition, list) and entry.condition and all(map(is_float32, entry.condition))
    ):
        raise RPGError(
            f"{where}: condition: expected null or a list of finite float32 numbers, got {entry.condition!r}"
        )
    if entry.description is not None and not (isinstance(entry.description, str) and entry.condition):
        raise RPGError(
            f"{where}: description: expected text, beside the condition that was made of it, "
            f"got {entry.description!r:.80}"
        )
    if not isinstance(entry.metrics, dict) or not all(map(is_number, entry.metrics.values())):
        raise RPGError(f"{where}: metrics: expected finite numbers by name, got {entry.metrics!r}")
    if entry.state is not None and not (type(entry.state) is int and 0 <= entry.state <= LARGEST_STATE):
        raise RPGError(f"{where}: state: expected 0 <= state <= {LARGEST_STATE}, got {entry.state!r:.80}")
    if entry.split not in SPLITS:
        raise RPGError(f"{where}: split: expected one of {', '.join(SPLITS)}, got {entry.split!r}")


def _stays_inside(file: str) -> bool:
    path = PurePosixPath(file)
    # A reader on another system would take backslashes for separators.
    odd = "\\" in file or not is_storable(file)
    return bool(path.parts) and not odd and not path.is_absolute() and ".." not in path.parts
