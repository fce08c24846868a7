"""The facts that `rpg inspect` prints about a checkpoint, a collection, shards or a generator."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rpg.collection.checkpoint import checkpoint_files, has_checkpoint_suffix, read_checkpoint
from rpg.collection.checkpoint_directory import is_adapter, is_checkpoint_directory, needed_files
from rpg.collection.collection import COLLECTION_FILE, Collection
from rpg.collection.layout import Layout
from rpg.collection.manifest import MANIFEST_FILE
from rpg.collection.shards import ShardedCollection
from rpg.collection.tensor_spec import TensorKind
from rpg.collection.tokens import count_tokens
from rpg.config import RayConfig, generator_config_from_yaml, to_plain
from rpg.errors import RPGError
from rpg.generator.saving import CONFIG_FILE, WEIGHTS_FILE
from rpg.state_dicts import dtype_name, find_ties
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath, exists, fetched
from rpg.storage.node_cache import local_copy
from rpg.text_encoder import check_encoder

DEFAULT_TOKEN_SIZE = 8192
"""The published model's token size."""
ENDS = 12
"""Rows shown of each end of a long layout."""


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the layout."""

    name: str
    shape: list[int]
    dtype: str
    kind: str
    alias_of: str | None
    parameters: int
    """Values; 0 for a tied tensor, which shares another's."""
    bytes: int
    tokens: int
    padding: int
    """Values of its tokens that are only padding."""


@dataclass(frozen=True)
class Inspection:
    """The facts; `to_json` gives them to machines, `to_rich` to people."""

    what: str
    path: str
    token_size: int
    tensors: list[TensorRow]
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts that only this kind of path has, such as the number of checkpoints."""

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the tensors; `padding_share` is the share of token values that are padding."""
        tokens = sum(row.tokens for row in self.tensors)
        padding = sum(row.padding for row in self.tensors)
        return {
            "tensors": len(self.tensors),
            "parameters": sum(row.parameters for row in self.tensors),
            "bytes": sum(row.bytes for row in self.tensors),
            "tokens": tokens,
            "padding_share": padding / (tokens * self.token_size) if tokens else 0.0,
        }

    def to_json(self) -> dict[str, Any]:
        """The facts as plain JSON values."""
        return {
            "what": self.what,
            "path": self.path,
            "token_size": self.token_size,
            **self.facts,
            "totals": self.totals,
            "tensors": [asdict(row) for row in self.tensors],
        }

    def to_rich(self, show_all: bool = False) -> RenderableType:
        """A table for the terminal; of a long layout the first and last rows only, unless `show_all`."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("tensor", "shape", "dtype", "kind"):
            table.add_column(heading, overflow="fold")
        for heading in ("values", "tokens", "padding"):
            table.add_column(heading, justify="right", no_wrap=True)
        left_out = 0 if show_all else max(0, len(self.tensors) - 2 * ENDS)
        for i, row in enumerate(self.tensors):
            if left_out and i == ENDS:
                table.add_row(Text(f"... {left_out} more (--all shows them)", style="dim"))
            if not left_out or i < ENDS or i >= len(self.tensors) - ENDS:
                kind = row.kind if row.alias_of is None else f"tied to {row.alias_of}"
                shape = "×".join(map(str, row.shape)) if row.shape else "scalar"
                share = _percent(row.padding / (row.tokens * self.token_size)) if row.tokens else ""
                # Text, because names may hold what rich reads as markup.
                cells = (row.name, shape, row.dtype, kind, f"{row.parameters:,}", f"{row.tokens:,}", share)
                table.add_row(*map(Text, cells))
        totals = self.totals
        summary = (
            f"{totals['tensors']:,} tensors, {totals['parameters']:,} values, {_size(totals['bytes'])}; "
            f"{totals['tokens']:,} tokens of {self.token_size:,}, {_percent(totals['padding_share'])} padding"
        )
        facts = [Text(f"{key.replace('_', ' ')}: {_fact(value)}") for key, value in self.facts.items()]
        return Group(Text(f"{self.path}: {self.what}", style="bold"), *facts, table, Text(summary))


def inspect(
    path: AnyPath,
    token_size: int | None = None,
    verify: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Describe the file or directory at `path`.

    Args:
        path: checkpoint file or directory, or directory of a collection, of shards, or of a
            generator; or a URI of one of these. Shards behind a URI are brought to this node's cache.
        token_size: of checkpoints and collections, which have no layout yet; default 8192, or the largest
            tensor's size if that is smaller. Shards and generators have a token size of their own.
        verify: check the files of a collection or of shards against their SHA-256.
        progress: called with the numbers of files verified and of all.

    Raises:
        RPGError: if `path` is none of these or cannot be read, if `token_size` is below 1 or given for shards
            or a generator, or if a verified file has changed.
    """
    if token_size is not None and token_size < 1:
        raise RPGError(f"--token-size: expected at least 1, got {token_size}")
    if not exists(path):
        raise RPGError(f"{path}: not found; expected a checkpoint, collection, shards or generator")
    has_layout = any(exists(path / name) for name in (MANIFEST_FILE, WEIGHTS_FILE))
    if has_layout and token_size is not None:
        raise RPGError(f"--token-size: {path} has a layout of its own; expected none")
    if exists(path / MANIFEST_FILE):
        return _shards(path, verify)
    if has_layout:
        return _generator(path)
    if exists(path / COLLECTION_FILE) or path.name == COLLECTION_FILE:
        return _collection(path, token_size, verify, progress)
    with storage_errors_for(path):
        is_directory = path.is_dir()
    if is_directory and not is_checkpoint_directory(path):
        hint = "; `rpg register` makes a collection of it" if _has_checkpoints(path) else ""
        raise RPGError(f"{path}: not a collection, shards, a generator or a checkpoint{hint}")
    return _checkpoint(path, token_size)


def _checkpoint(path: AnyPath, token_size: int | None) -> Inspection:
    with fetched(path, needed_files) as local:
        state_dict = read_checkpoint(local)
        facts = {"file_bytes": sum(file.stat().st_size for file in checkpoint_files(local))}
        what = "PEFT adapter" if is_adapter(local) else "checkpoint"
    size = token_size or _default_token_size(state_dict)
    return Inspection(what, str(path), size, _rows(state_dict, size), facts)


def _collection(
    path: AnyPath, token_size: int | None, verify: bool, progress: Callable[[int, int], None] | None
) -> Inspection:
    collection = Collection.load(path)
    if not collection.entries:
        raise RPGError(f"{path}: the collection is empty; expected at least one checkpoint")
    if verify:
        if collection.encoder:
            check_encoder(collection.encoder_directory, collection.encoder)
        for done, entry in enumerate(collection.entries, start=1):
            collection.check(entry)
            if progress is not None:
                progress(done, len(collection))
    state_dict = collection.read(collection.entries[0])
    size = token_size or _default_token_size(state_dict)
    facts: dict[str, Any] = {
        "checkpoints": len(collection),
        "splits": {split: len(entries) for split, entries in collection.splits.items()},
        "condition_width": collection.condition_width,
        "architecture": collection.architecture,
        "layout_of": collection.entries[0].file,
    }
    if states := {entry.state for entry in collection.entries if entry.state is not None}:
        facts["permutation_states"] = len(states)
    if collection.encoder:
        facts["text_encoder"] = collection.encoder
    if reading := collection.reading.to_json():
        facts["reading"] = reading
    if verify:
        facts["verified"] = True
    return Inspection("collection", str(path), size, _rows(state_dict, size), facts)


def _shards(path: AnyPath, verify: bool) -> Inspection:
    defaults = RayConfig()
    limit = int(defaults.cache_gigabytes * 1e9)
    shards = ShardedCollection.open(local_copy(path, Path(defaults.cache_directory), limit))
    if verify:
        shards.verify()
    facts: dict[str, Any] = {
        "checkpoints": len(shards),
        "condition_width": None if shards.conditions is None else shards.conditions.shape[1],
        "dtype": shards.dtype.value,
        "normalisation": shards.layout.normalisation.value,
        "digest": shards.layout.digest(),
        **_companions_fact(shards.layout),
    }
    if shards.states is not None:
        facts["permutation_states"] = len(shards.states.unique())
    if verify:
        facts["verified"] = True
    return Inspection("shards", str(path), shards.layout.token_size, _layout_rows(shards.layout), facts)


def _generator(path: AnyPath) -> Inspection:
    with fetched(path) as local:
        config = generator_config_from_yaml(local / CONFIG_FILE)
        weights = read_checkpoint(local / WEIGHTS_FILE)
        layout = Layout.load(local)
    facts = {
        "generator_parameters": sum(tensor.numel() for tensor in weights.values()),
        "generator_bytes": sum(tensor.nbytes for tensor in weights.values()),
        "normalisation": layout.normalisation.value,
        **_companions_fact(layout),
        "config": to_plain(config),
    }
    return Inspection("generator", str(path), layout.token_size, _layout_rows(layout), facts)


def _companions_fact(layout: Layout) -> dict[str, Any]:
    return {"companions": layout.companions.digests} if layout.companions else {}


def _rows(state_dict: Mapping[str, Tensor], token_size: int) -> list[TensorRow]:
    """The rows of a checkpoint that has no layout yet; every float tensor counts as one that varies."""
    ties = find_ties(state_dict)
    rows = []
    for name, tensor in state_dict.items():
        kind = TensorKind.constant
        if tensor.is_floating_point() and tensor.numel():
            kind = TensorKind.running_var if name.endswith("running_var") else TensorKind.weight
        is_tied = name in ties
        numel = tensor.numel()
        tokens = 0 if is_tied or kind == TensorKind.constant else count_tokens(numel, token_size)
        rows.append(
            TensorRow(
                name,
                list(tensor.shape),
                dtype_name(tensor.dtype),
                kind.value,
                ties.get(name),
                0 if is_tied else numel,
                0 if is_tied else numel * tensor.element_size(),
                tokens,
                tokens * token_size - numel if tokens else 0,
            )
        )
    return rows


def _layout_rows(layout: Layout) -> list[TensorRow]:
    return [
        TensorRow(
            spec.name,
            list(spec.shape),
            dtype_name(spec.dtype),
            spec.kind.value,
            spec.alias_of,
            0 if spec.alias_of else spec.numel,
            0 if spec.alias_of else spec.numel * spec.dtype.itemsize,
            spec.tokens,
            spec.tokens * layout.token_size - spec.numel if spec.tokens else 0,
        )
        for spec in layout.specs
    ]


def _default_token_size(state_dict: Mapping[str, Tensor]) -> int:
    largest = max((tensor.numel() for tensor in state_dict.values() if tensor.is_floating_point()), default=1)
    return max(1, min(DEFAULT_TOKEN_SIZE, largest))


def _has_checkpoints(path: AnyPath) -> bool:
    with storage_errors_for(path):
        return any(has_checkpoint_suffix(child) or is_checkpoint_directory(child) for child in path.iterdir())


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_fact(item)}" for key, item in value.items()) or "not given"
    return "none" if value is None else f"{value:,}" if type(value) is int else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _size(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
