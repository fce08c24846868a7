"""Registering: turning a plain folder of checkpoints into a collection."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rpg.collection.checkpoint import (
    examine_checkpoint,
    has_checkpoint_suffix,
    looks_like_checkpoint,
    read_checkpoint,
)
from rpg.collection.checkpoint_directory import PART, index_of, is_checkpoint_directory
from rpg.collection.collection import COLLECTION_FILE, Collection, Entry
from rpg.collection.companions import companions_of
from rpg.collection.conditions import (
    UPSTREAM_PATTERN,
    DescriptionRow,
    NameFacts,
    NamePattern,
    read_conditions,
    read_descriptions,
)
from rpg.collection.reading import Reading
from rpg.collection.splits_and_metrics import read_metrics, read_splits
from rpg.collection.tables import check_files
from rpg.collection.torch_file import OtherContentError
from rpg.collection.uniformity import Uniformity
from rpg.collection.wrappers import WRAPPERS
from rpg.encoders import Encoder, load_encoder, open_encoder
from rpg.errors import RPGError
from rpg.storage.errors import StorageError, storage_errors_for
from rpg.storage.locations import AnyPath, exists, is_remote
from rpg.text_encoder import ENCODER_DIRECTORY, copy_encoder, encoder_digest

MINIMUM = 2


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
    *,
    key: str | None = None,
    ignore: Sequence[str] = (),
    canonical_factors: bool | None = None,
    splits: Sequence[str] = (),
    metrics: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> tuple[Collection, list[str]]:
    """Write `collection.json` for the checkpoints that lie directly in `directory`, sorted by name.

    Every checkpoint is read and compared with the first good one in names, shapes and dtypes. Conditions come
    from the first of these that is given: the `conditions` file (`read_conditions`), the embeddings of the
    `descriptions` (`read_descriptions`), `pattern` over the file names (`NamePattern`), or the published
    model's naming if all names follow it. Permutation states and metrics come from the names. An earlier
    `collection.json` keeps its splits, so that held-out checkpoints stay held out, and all values that are
    not given anew.

    Args:
        directory: folder or URI of checkpoint files, and of directories of PEFT adapters and Hugging Face
            models; others are ignored.
        conditions: CSV or JSON file.
        pattern: template or regular expression; it may have no condition if `conditions` or `descriptions`
            are given.
        skip_bad: leave bad checkpoints out.
        progress: called with the numbers of checkpoints done and of all.
        descriptions: CSV or JSON file; not together with `conditions`.
        encoder: directory of the encoder of the descriptions (`rpg.encoders`), which is copied into
            the collection; None: use the collection's.
        key: the mapping of tensors to take, as in `Reading.key`.
        ignore: patterns of tensors to leave out, as in `Reading.ignore`.
        canonical_factors: as in `Reading.canonical_factors`; None: as in the earlier collection.
        splits: choices of checkpoints for splits (`read_splits`).
        metrics: CSV or JSON file (`read_metrics`).
        note: called with each line that says what was done to the checkpoints, or left out of the folder.

    Returns:
        The collection and, for each checkpoint left out, the line that says why.

    Raises:
        BadCheckpointsError: if checkpoints are bad and `skip_bad` is off.
        RPGError: if fewer than two checkpoints are left, conditions, descriptions, splits, metrics or
            patterns are wrong, the text encoder cannot be used, or a file beside the first checkpoint's
            weights cannot be part of a model (`companions_of`).
    """
    if conditions is not None and descriptions is not None:
        raise RPGError("conditions: expected either a file of them or descriptions, got both")
    if pattern is not None and (file := conditions or descriptions) and NamePattern(pattern).has_condition:
        raise RPGError(f"pattern '{pattern}': has a condition, and so has {file}; expected one of them")
    if encoder is not None and descriptions is None:
        raise RPGError(f"{encoder}: an encoder needs descriptions to read; got none")
    has_earlier = exists(directory / COLLECTION_FILE)
    earlier = Collection.load(directory) if has_earlier else Collection(directory, {}, [])
    reading = Reading(
        key or earlier.reading.key,
        tuple(WRAPPERS),
        tuple(dict.fromkeys([*earlier.reading.ignore, *ignore])),
        earlier.reading.canonical_factors if canonical_factors is None else canonical_factors,
    )
    rows = {} if conditions is None else read_conditions(conditions)
    texts = {} if descriptions is None else read_descriptions(descriptions)
    folder = _Folder(directory, reading)
    compiled = NamePattern(UPSTREAM_PATTERN if pattern is None else pattern)
    if table := rows or texts:
        folder.leave_out_others(name for name in folder.names if name not in table)
    elif pattern is not None or any(compiled.read(name) for name in folder.names):
        folder.leave_out_others(name for name in folder.names if compiled.read(name) is None)
    names = folder.names
    facts = _name_facts(names, pattern, all_or_none=conditions is None and descriptions is None)
    if conditions is not None:
        check_files(rows, names, conditions, "condition")
    split_of = read_splits(splits, names)
    measured = {} if metrics is None else read_metrics(metrics, names)
    known = {entry.file: entry for entry in earlier.entries}
    embedding = None if descriptions is None else _Embedding(descriptions, texts, names, encoder, earlier)
    all_anew = bool(rows) or any(fact.condition is not None for fact in facts.values())

    entries: list[Entry] = []
    problems: list[str] = []
    uniformity = Uniformity()
    paths = folder.paths
    for done, path in enumerate(paths):
        if progress is not None:
            progress(done, len(paths))
        entry = known.get(path.name, Entry(path.name, ""))
        if (fact := facts.get(path.name)) is not None:
            entry.condition = fact.condition if fact.condition is not None else entry.condition
            entry.metrics |= fact.metrics
            entry.state = fact.state if fact.state is not None else entry.state
        entry.metrics |= measured.get(path.name, {})
        entry.split = split_of.get(path.name, entry.split)
        if path.name in rows:
            entry.condition = rows[path.name].condition
        try:
            examined = examine_checkpoint(path, reading)
            uniformity.add(examined, path, None if entry.condition is None else tuple(entry.condition))
        except StorageError:
            # The storage failed. The checkpoint may be good, so it must not be left out.
            raise
        except OtherContentError as error:
            folder.leave_out(path, error)
            continue
        except RPGError as error:
            problems.append(str(error))
            continue
        entry.sha256 = examined.sha256
        if all_anew:
            entry.description = None
        if embedding is not None:
            entry.condition, entry.description = embedding.of(path.name)
        entries.append(entry)
    if progress is not None:
        progress(len(paths), len(paths))

    total = len(folder.paths)
    if problems and not skip_bad:
        raise BadCheckpointsError(
            f"{directory}: {len(problems)} of {total} checkpoints cannot be used; --skip-bad leaves them out",
            problems,
        )
    if len(entries) < MINIMUM:
        count = f"{len(entries)} of {total} can be used" if problems else f"found {len(entries)}"
        raise BadCheckpointsError(
            f"{directory}: a collection needs at least {MINIMUM} checkpoints, {count}", problems
        )
    if unused := [each for each in ignore if each not in uniformity.ignored]:
        raise RPGError(f"--ignore {unused[0]}: matches no tensor of any checkpoint")
    kept = None if all_anew else earlier.encoder
    read_by = kept if embedding is None else embedding.digest
    reading = replace(reading, unwrap=uniformity.wrappers)
    collection = Collection(directory, earlier.architecture, entries, read_by, reading)
    if isinstance(directory, Path):
        # What cannot be part of a model is told now, and not when the collection is sharded.
        first = next((entry for entry in entries if entry.split == "train"), entries[0])
        companions_of(directory / first.file, directory)
    if encoder is not None:
        copy_encoder(encoder, collection.encoder_directory)
    collection.save()
    if note is not None:
        for line in [*uniformity.notes(), *folder.notes()]:
            note(line)
    return collection, problems


class _Folder:
    """The checkpoints in a folder, and what lies beside them."""

    def __init__(self, directory: AnyPath, reading: Reading) -> None:
        self._reading = reading
        self._others: dict[str, str] = {}
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
        parts = {name for name in names if (part := PART.fullmatch(name)) and index_of(part) in names}
        self.paths = [path for path in paths if path.name not in parts and self._is_candidate(path)]
        if len(self.paths) < MINIMUM and is_checkpoint_directory(directory):
            raise RPGError(f"{directory}: is itself one checkpoint; expected a folder of such directories")

    @property
    def names(self) -> list[str]:
        """Names of the checkpoints, in order."""
        return [path.name for path in self.paths]

    def leave_out_others(self, names: Iterable[str]) -> None:
        """Leave out those of the files that hold something else, such as an optimiser's state."""
        suspects = set(names)
        for path in list(self.paths):
            if path.name in suspects:
                try:
                    read_checkpoint(path, self._reading)
                except OtherContentError as error:
                    self.leave_out(path, error)
                except StorageError:
                    raise
                except RPGError:
                    # It is read and reported with the others.
                    continue

    def leave_out(self, path: AnyPath, error: OtherContentError) -> None:
        """Leave out a file that holds something else."""
        self._others[path.name] = error.content
        self.paths = [other for other in self.paths if other != path]

    def notes(self) -> list[str]:
        """What was left out, in one line."""
        listed = ", ".join(f"{name} ({content})" for name, content in self._others.items())
        return [f"left out: {listed}"] if listed else []

    def _is_candidate(self, path: AnyPath) -> bool:
        with storage_errors_for(path):
            is_encoder = path.name == ENCODER_DIRECTORY and path.is_dir()
        if is_encoder:
            self._others[f"{path.name}/"] = "the place of a collection's text encoder"
            return False
        if is_remote(path):
            # The name of a file decides, since asking the storage about each would take long.
            return has_checkpoint_suffix(path) or is_checkpoint_directory(path)
        assert isinstance(path, Path)
        if path.is_file():
            # Files of many programs end in .bin or .tar.
            is_named = has_checkpoint_suffix(path) and path.suffix.lower() not in (".bin", ".tar")
            return is_named or looks_like_checkpoint(path)
        # A link to nothing counts as a checkpoint, so that reading it reports that it is missing.
        is_named = has_checkpoint_suffix(path) and (path.is_dir() or not path.exists())
        return is_named or is_checkpoint_directory(path)


class _Embedding:
    """The descriptions of a folder's checkpoints, and the encoder that embeds them."""

    def __init__(
        self,
        table: Path,
        rows: dict[str, DescriptionRow],
        names: list[str],
        encoder: Path | None,
        earlier: Collection,
    ) -> None:
        self._rows = rows
        check_files(self._rows, names, table, "description")
        if encoder is not None:
            self._encoder: Encoder = open_encoder(encoder)
            self.digest = encoder_digest(encoder)
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
