"""The manifest of a directory of shards: `shards.json` and `entries.arrow`.

`shards.json` names the shards with their sizes and digests. It is written last, and a directory without it is
incomplete. `entries.arrow` has a row for each checkpoint: name, SHA-256, shard, record batch, split,
condition, and permutation state, if the collection has them.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from rpg.collection.collection import Entry
from rpg.collection.layout import Layout
from rpg.collection.reading import AS_STORED, Reading
from rpg.collection.shard_file import ShardInfo
from rpg.config import TokenDtype
from rpg.errors import RPGError, one_line
from rpg.storage.below import read_below
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import fits_file_systems, is_storable, read_json, replacing_file, sha256, write_json
from rpg.storage.locations import AnyPath

MANIFEST_FILE = "shards.json"
ENTRIES_FILE = "entries.arrow"
VERSION = 2
_MOST_ENTRIES_BYTES = 2**32
_KEYS = {"version", "dtype", "token_size", "layout", "fitted", "entries_sha256", "shards"}
_SHARD_KEYS = {"file", "bytes", "sha256", "checkpoints"}
_COLUMNS = {"name": pa.string(), "sha256": pa.string(), "shard": pa.int32(), "batch": pa.int32()}


@dataclass(frozen=True)
class ShardManifest:
    """A complete directory of shards."""

    dtype: TokenDtype
    layout: str
    """Digest of the layout that the tokens were made with."""
    fitted: int
    """Number of checkpoints, the first ones, that layout and centre were computed from."""
    shards: list[ShardInfo]
    names: list[str]
    """Names of the checkpoints, in order."""
    sha256: dict[str, str]
    """Digest of each checkpoint, by name: its `Entry.sha256`."""
    places: list[tuple[int, int]]
    """Shard and record batch of each checkpoint."""
    conditions: Tensor | None
    """Float32 [checkpoints, width]; None if the collection has none."""
    encoder: str = ""
    """Digest of the text encoder that the conditions came from; empty if there is none."""
    reading: Reading = AS_STORED
    """How the collection's checkpoints were read."""
    states: Tensor | None = None
    """Permutation states, int64 [checkpoints]; None if the collection has none."""


def write_manifest(
    directory: AnyPath,
    layout: Layout,
    shards: Sequence[ShardInfo],
    entries: Sequence[Entry],
    dtype: TokenDtype,
    fitted: int | None = None,
    encoder: str | None = None,
    reading: Reading = AS_STORED,
) -> None:
    """Make a directory of shards complete: write layout, entries and, last, the manifest.

    Args:
        directory: where the shards already are.
        layout: that they were written with.
        shards: in the order in which their checkpoints are listed.
        entries: one for each checkpoint in the shards, whose name is the entry's `file`; others are ignored.
        dtype: that they were written with.
        fitted: how many checkpoints, the first ones, the layout was computed from; default all.
        encoder: digest of the text encoder that the conditions came from.
        reading: how the checkpoints were read.

    Raises:
        RPGError: naming the shard or checkpoint, if a shard has another layout or dtype, a checkpoint has no
            entry or is there twice, conditions differ in width, or only some have a permutation state; naming
            the file that cannot be written.
    """
    if not shards:
        raise RPGError(f"{directory / MANIFEST_FILE}: expected at least one shard")
    for shard in shards:
        if (shard.layout, shard.dtype) != (layout.digest(), dtype):
            raise RPGError(
                f"{directory / shard.file}: was written with another layout or dtype than the manifest's"
            )
    table = _entries_table(directory, shards, {entry.file: entry for entry in entries})
    layout.save(directory)
    with replacing_file(directory / ENTRIES_FILE) as temporary:
        with temporary.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        entries_sha256 = sha256(temporary)
    write_json(
        directory / MANIFEST_FILE,
        {
            "version": VERSION,
            "dtype": dtype.value,
            "token_size": layout.token_size,
            "layout": layout.digest(),
            "fitted": len(table) if fitted is None else fitted,
            "entries_sha256": entries_sha256,
            **({} if encoder is None else {"encoder": encoder}),
            **({} if reading == AS_STORED else {"reading": reading.to_json()}),
            "shards": [
                {
                    "file": shard.file,
                    "bytes": shard.bytes,
                    "sha256": shard.sha256,
                    "checkpoints": len(shard.checkpoints),
                }
                for shard in shards
            ],
        },
    )


def read_manifest(directory: AnyPath) -> ShardManifest:
    """Read what `write_manifest` wrote, except for the layout.

    Raises:
        RPGError: naming the file that is missing, damaged, of another version, or not what it should be.
    """
    path = directory / MANIFEST_FILE
    content = read_json(path, "the manifest of a directory of shards", root=directory)
    _check(content, str(path))
    entries = _read_entries(directory, content["entries_sha256"])
    names: list[str] = entries.column("name").to_pylist()
    places = list(zip(entries.column("shard").to_pylist(), entries.column("batch").to_pylist(), strict=True))
    listed = sum(shard["checkpoints"] for shard in content["shards"])
    if listed != len(names):
        raise RPGError(
            f"{path}: shards: expected {len(names)} checkpoints in all, as {ENTRIES_FILE} has, found {listed}"
        )
    in_shards: list[dict[int, str]] = [{} for _ in content["shards"]]
    for name, (shard, batch) in zip(names, places, strict=True):
        if not (0 <= shard < len(in_shards) and 0 <= batch < content["shards"][shard]["checkpoints"]):
            raise RPGError(
                f"{directory / ENTRIES_FILE}: '{name}': no record batch {batch} in shard {shard}; "
                f"expected a place within the shards that {MANIFEST_FILE} lists"
            )
        in_shards[shard][batch] = name
    dtype = TokenDtype(content["dtype"])
    shards = [
        ShardInfo(
            shard["file"], shard["bytes"], shard["sha256"],
            tuple(found.get(batch, "") for batch in range(shard["checkpoints"])), content["layout"], dtype,
        )
        for shard, found in zip(content["shards"], in_shards, strict=True)
    ]  # fmt: skip
    digests = dict(zip(names, entries.column("sha256").to_pylist(), strict=True))
    return ShardManifest(
        dtype, content["layout"], content["fitted"], shards, names, digests, places, _conditions(entries),
        content.get("encoder", ""), Reading.from_json(content.get("reading", {}), f"{path}: reading"),
        _states(entries),
    )  # fmt: skip


def _entries_table(directory: AnyPath, shards: Sequence[ShardInfo], entries: dict[str, Entry]) -> Any:
    names = [name for shard in shards for name in shard.checkpoints]
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise RPGError(f"{directory}: checkpoint '{name}' is in the shards twice")
        seen.add(name)
        if name not in entries:
            raise RPGError(f"{directory}: checkpoint '{name}' is in the shards but not in the collection")
    # Arrow refuses integers that float32 cannot hold exactly, but rounds floats.
    found = [entries[name].condition for name in names]
    conditions = [None if values is None else list(map(float, values)) for values in found]
    width = None if conditions[0] is None else len(conditions[0])
    for name, condition in zip(names, conditions, strict=True):
        other = None if condition is None else len(condition)
        if other != width:
            raise RPGError(
                f"'{name}': expected a condition of width {width}, as '{names[0]}' has, found {other}"
            )
    columns = {
        "name": pa.array(names, pa.string()),
        "sha256": pa.array([entries[name].sha256 for name in names], pa.string()),
        "shard": pa.array([i for i, shard in enumerate(shards) for _ in shard.checkpoints], pa.int32()),
        "batch": pa.array([i for shard in shards for i, _ in enumerate(shard.checkpoints)], pa.int32()),
        "split": pa.array([entries[name].split for name in names], pa.string()),
        "condition": pa.array(conditions, pa.null() if width is None else pa.list_(pa.float32(), width)),
    }
    states = {name: entries[name].state for name in names}
    if without := [name for name, state in states.items() if state is None]:
        if len(without) < len(names):
            raise RPGError(f"'{without[0]}': expected a permutation state, as other checkpoints have")
    else:
        columns["state"] = pa.array(list(states.values()), pa.int32())
    return pa.table(columns)


def _read_entries(directory: AnyPath, expected: str) -> Any:
    path = directory / ENTRIES_FILE
    try:
        with storage_errors_for(path):
            content = read_below(directory, ENTRIES_FILE, _MOST_ENTRIES_BYTES)
    except OSError as error:
        raise RPGError(
            f"{path}: cannot be read: {error.strerror}; expected the checkpoints' entries"
        ) from error
    if hashlib.sha256(content).hexdigest() != expected:
        raise RPGError(f"{path}: damaged, or of other shards: its SHA-256 is not the one in {MANIFEST_FILE}")
    try:
        table = pa.ipc.open_file(content).read_all()
        table.validate(full=True)
    except (OSError, ValueError) as error:
        raise RPGError(f"{path}: not an Arrow file: {one_line(error)}") from error
    for column, expected_type in _COLUMNS.items():
        if column not in table.column_names or table.column(column).type != expected_type:
            raise RPGError(f"{path}: column '{column}': expected one of type {expected_type}")
        if table.column(column).null_count:
            raise RPGError(f"{path}: column '{column}': expected a value in every row")
    if "condition" not in table.column_names or not _are_conditions(table.column("condition")):
        raise RPGError(f"{path}: column 'condition': expected nulls, or float32 lists of one width")
    if "state" in table.column_names and not _are_states(table.column("state")):
        raise RPGError(f"{path}: column 'state': expected 0 or more in every row, of type {pa.int32()}")
    return table


def _are_conditions(column: Any) -> bool:
    if pa.types.is_null(column.type):
        return True
    if not pa.types.is_fixed_size_list(column.type) or column.type.value_type != pa.float32():
        return False
    return not (column.null_count or column.combine_chunks().flatten().null_count)


def _are_states(column: Any) -> bool:
    return column.type == pa.int32() and not column.null_count and min(column.to_pylist(), default=0) >= 0


def _states(entries: Any) -> Tensor | None:
    if "state" not in entries.column_names:
        return None
    return torch.tensor(entries.column("state").to_pylist())


def _conditions(entries: Any) -> Tensor | None:
    column = entries.column("condition").combine_chunks()
    if pa.types.is_null(column.type):
        return None
    values = column.flatten().to_numpy(zero_copy_only=False)
    return torch.from_numpy(values.reshape(len(column), column.type.list_size).copy())


def _check(manifest: Any, source: str) -> None:
    if not isinstance(manifest, dict):
        raise RPGError(f"{source}: expected a manifest, a JSON object, found {type(manifest).__name__}")
    if manifest.get("version") != VERSION:
        raise RPGError(f"{source}: version: expected {VERSION}, got {manifest.get('version')!r}")
    if missing := sorted(_KEYS - set(manifest)):
        raise RPGError(f"{source}: key '{missing[0]}' is missing")
    if manifest["dtype"] not in list(TokenDtype):
        raise RPGError(f"{source}: dtype: expected one of {', '.join(TokenDtype)}, got {manifest['dtype']!r}")
    if type(manifest["fitted"]) is not int or manifest["fitted"] < 1:
        raise RPGError(f"{source}: fitted: expected a positive integer, got {manifest['fitted']!r}")
    if not isinstance(manifest.get("encoder", ""), str):
        raise RPGError(f"{source}: encoder: expected a digest, got {manifest['encoder']!r:.80}")
    shards = manifest["shards"]
    if not isinstance(shards, list) or not shards:
        raise RPGError(f"{source}: shards: expected a list of at least one shard")
    for i, shard in enumerate(shards):
        if not isinstance(shard, dict) or not set(shard) >= _SHARD_KEYS:
            raise RPGError(f"{source}: shard {i}: expected the keys {', '.join(sorted(_SHARD_KEYS))}")
        if not isinstance(shard["file"], str) or not _is_plain_name(shard["file"]):
            raise RPGError(f"{source}: shard {i}: file: expected a name without a directory")
        if not all(type(shard[key]) is int and shard[key] > 0 for key in ("bytes", "checkpoints")):
            raise RPGError(f"{source}: shard {i}: expected positive integers for 'bytes' and 'checkpoints'")


def _is_plain_name(file: str) -> bool:
    return (
        PurePosixPath(file).name == file
        and file not in ("", "..")
        and is_storable(file)
        and fits_file_systems(file)
    )
