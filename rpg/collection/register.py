"""Registering: turning a plain folder of checkpoints into a collection."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rpg.collection.checkpoint import CHECKPOINT_SUFFIXES, check_finite, read_checkpoint_and_sha256
from rpg.collection.checkpoint_directory import INDEX_SUFFIX, PART, is_checkpoint_directory
from rpg.collection.collection import COLLECTION_FILE, Collection, Entry
from rpg.collection.conditions import (
    UPSTREAM_PATTERN,
    ConditionRow,
    NameFacts,
    NamePattern,
    read_conditions,
    read_descriptions,
)
from rpg.collection.state_dicts import check_structure, check_ties, find_ties
from rpg.collection.tables import check_files
from rpg.errors import RPGError
from rpg.storage.errors import StorageError, storage_errors_for
from rpg.storage.locations import AnyPath, exists, is_remote
from rpg.text_encoder import ENCODER_DIRECTORY, TextEncoder, copy_encoder, encoder_digest, load_encoder

MINIMUM = 2


@dataclass(frozen=True)
class _Reference:
    """Structure of the first good checkpoint, which all others must have."""

    file: str
    form: dict[str, tuple[tuple[int, ...], torch.dtype]]
    ties: dict[str, str]


class BadCheckpointsError(RPGError):
    """Checkpoints cannot be part of a collection; `problems` has one line for each."""

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems


def register(
    directory: AnyPath,
    conditions: Path | None = None,
    pattern: str | None = None,
    skip_bad: bool = False,
    progress: Callable[[int, int], None] | None = None,
    descriptions: Path | None = None,
    encoder: Path | None = None,
) -> tuple[Collection, list[str]]:
    """Write `collection.json` for the checkpoints that lie directly in `directory`, sorted by name.

    Every checkpoint is read and compared with the first good one in names, shapes and dtypes. Conditions come
    from the first of these that is given: the `conditions` file (`read_conditions`), the embeddings of the
    `descriptions` (`read_descriptions`), `pattern` over the file names (`NamePattern`), or the published
    model's naming if all names follow it. Permutation states and metrics come from the names. An earlier
    `collection.json` keeps its splits, so that held-out checkpoints stay held out, and all values that are
    not given anew.

    Args:
        directory: folder or URI of `.safetensors`, `.pt`/`.pth` and directories of PEFT adapters and Hugging
            Face models; others are ignored.
        conditions: CSV or JSON file.
        pattern: template or regular expression; it may have no condition if `conditions` or `descriptions`
            are given.
        skip_bad: leave bad checkpoints out.
        progress: called with the numbers of checkpoints done and of all.
        descriptions: CSV or JSON file; not together with `conditions`.
        encoder: directory of the text encoder that embeds the descriptions (`TextEncoder`), which is copied
            into the collection; None: use the collection's.

    Returns:
        The collection and, for each checkpoint left out, the line that says why.

    Raises:
        BadCheckpointsError: if checkpoints are bad and `skip_bad` is off.
        RPGError: if fewer than two checkpoints are left, conditions or descriptions are wrong, or the text
            encoder cannot be used.
    """
    if conditions is not None and descriptions is not None:
        raise RPGError("conditions: expected either a file of them or descriptions, got both")
    if pattern is not None and (file := conditions or descriptions) and NamePattern(pattern).has_condition:
        raise RPGError(f"pattern '{pattern}': has a condition, and so has {file}; expected one of them")
    if encoder is not None and descriptions is None:
        raise RPGError(f"{encoder}: an encoder needs descriptions to read; got none")
    paths = _candidates(directory)
    names = [path.name for path in paths]
    facts = _name_facts(names, pattern, all_or_none=conditions is None and descriptions is None)
    rows: dict[str, ConditionRow] = {}
    if conditions is not None:
        rows = read_conditions(conditions)
        check_files(rows, names, conditions, "condition")
    has_earlier = exists(directory / COLLECTION_FILE)
    earlier = Collection.load(directory) if has_earlier else Collection(directory, {}, [])
    known = {entry.file: entry for entry in earlier.entries}
    embedding = None if descriptions is None else _Embedding(descriptions, names, encoder, earlier)
    all_anew = bool(rows) or any(fact.condition is not None for fact in facts.values())

    entries: list[Entry] = []
    problems: list[str] = []
    reference: _Reference | None = None
    for done, path in enumerate(paths):
        if progress is not None:
            progress(done, len(paths))
        try:
            state_dict, digest = read_checkpoint_and_sha256(path)
            if reference is not None:
                _compare(state_dict, path, reference)
            check_finite(state_dict, path)
        except StorageError:
            # The storage failed. The checkpoint may be good, so it must not be left out.
            raise
        except RPGError as error:
            problems.append(str(error))
            continue
        if reference is None:
            form = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state_dict.items()}
            reference = _Reference(path.name, form, find_ties(state_dict))
        entry = known.get(path.name, Entry(path.name, digest))
        entry.sha256 = digest
        if (fact := facts.get(path.name)) is not None:
            entry.condition = fact.condition if fact.condition is not None else entry.condition
            entry.metrics |= fact.metrics
            entry.state = fact.state if fact.state is not None else entry.state
        if path.name in rows:
            entry.condition = rows[path.name].condition
        if all_anew:
            entry.description = None
        if embedding is not None:
            entry.condition, entry.description = embedding.of(path.name)
        entries.append(entry)
    if progress is not None:
        progress(len(paths), len(paths))

    if problems and not skip_bad:
        raise BadCheckpointsError(
            f"{directory}: {len(problems)} of {len(paths)} checkpoints cannot be used; "
            "--skip-bad leaves them out",
            problems,
        )
    if len(entries) < MINIMUM:
        found = f"{len(entries)} of {len(paths)} can be used" if problems else f"found {len(entries)}"
        raise BadCheckpointsError(
            f"{directory}: a collection needs at least {MINIMUM} checkpoints, {found}", problems
        )
    kept = None if all_anew else earlier.encoder
    read_by = kept if embedding is None else embedding.digest
    collection = Collection(directory, earlier.architecture, entries, read_by)
    if encoder is not None:
        copy_encoder(encoder, collection.encoder_directory)
    collection.save()
    return collection, problems


class _Embedding:
    """The descriptions of a folder's checkpoints, and the encoder that embeds them."""

    def __init__(self, table: Path, names: list[str], encoder: Path | None, earlier: Collection) -> None:
        self._rows = read_descriptions(table)
        check_files(self._rows, names, table, "description")
        if encoder is not None:
            self._encoder, self.digest = TextEncoder(encoder), encoder_digest(encoder)
        elif earlier.encoder is not None:
            self.digest = earlier.encoder
            self._encoder = load_encoder(earlier.encoder_directory, self.digest)
        else:
            raise RPGError(
                f"{table}: descriptions need a text encoder, and the collection has none yet: --encoder DIR"
            )
        self._known: dict[str, list[float]] = {}

    def of(self, name: str) -> tuple[list[float], str]:
        """Condition and description of a checkpoint.

        Raises:
            RPGError: naming the row whose description cannot be embedded.
        """
        row = self._rows[name]
        if row.description not in self._known:
            try:
                self._known[row.description] = self._encoder.encode(row.description)
            except RPGError as error:
                raise RPGError(f"{row.where}: {error}") from error
        return self._known[row.description], row.description


def _candidates(directory: AnyPath) -> list[AnyPath]:
    try:
        with storage_errors_for(directory):
            if not directory.is_dir():
                raise RPGError(f"{directory}: not a directory; expected a folder of checkpoints")
            paths = sorted(
                (path for path in directory.iterdir() if not path.name.startswith(".")),
                key=lambda path: path.name,
            )
    except OSError as error:
        raise RPGError(f"{directory}: cannot be read: {error.strerror}") from error
    names = {path.name for path in paths}
    # The parts of one checkpoint are not rivals of each other.
    parts = {
        name
        for name in names
        if (match := PART.fullmatch(name)) and match[1] + match[2] + INDEX_SUFFIX in names
    }
    found = [path for path in paths if path.name not in parts | {ENCODER_DIRECTORY} and _is_candidate(path)]
    if len(found) < MINIMUM and is_checkpoint_directory(directory):
        raise RPGError(f"{directory}: is itself one checkpoint; expected a folder of such directories")
    return found


def _is_candidate(path: AnyPath) -> bool:
    if path.suffix.lower() in CHECKPOINT_SUFFIXES:
        # A link to nothing counts as a checkpoint, so that reading it reports that it is missing. The name of
        # a remote file decides, since asking the storage about each would take long.
        return is_remote(path) or path.is_file() or path.is_dir() or not path.exists()
    return is_checkpoint_directory(path)


def _name_facts(names: list[str], pattern: str | None, all_or_none: bool) -> Mapping[str, NameFacts]:
    """The facts in file names, by name.

    Without a `pattern`, if only some names follow the published model's naming: none, or an error if
    `all_or_none`.
    """
    compiled = NamePattern(UPSTREAM_PATTERN if pattern is None else pattern)
    facts = {name: compiled.read(name) for name in names}
    unmatched = [name for name, fact in facts.items() if fact is None]
    if pattern is None and (len(unmatched) == len(names) or (unmatched and not all_or_none)):
        return {}
    if unmatched:
        given = f"pattern '{pattern}'" if pattern is not None else "the naming of the others (class number)"
        raise RPGError(f"{unmatched[0]}: name does not match {given}; expected it of every checkpoint")
    return {name: fact for name, fact in facts.items() if fact is not None}


def _compare(state_dict: Mapping[str, Tensor], path: AnyPath, reference: _Reference) -> None:
    try:
        check_structure(state_dict, reference.form)
        check_ties(state_dict, reference.ties.items())
    except RPGError as error:
        raise RPGError(f"{path}: {error} (as in {reference.file})") from error
