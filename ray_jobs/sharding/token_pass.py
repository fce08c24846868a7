"""Second pass of stage `shard`: Ray Data's workers write the shards, each named by a digest of its inputs."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ray
import torch
from torch import Tensor

from ray_jobs.ray_data import Row, map_rows, returns_errors
from ray_jobs.sharding.resume import ShardResume
from rpg.collection.checkpoint import check_finite
from rpg.collection.collection import Collection, Entry
from rpg.collection.layout import Layout
from rpg.collection.shard_file import ShardInfo, token_bytes, write_shard
from rpg.commands.progress import ProgressDisplay
from rpg.config import ShardConfig, TokenDtype
from rpg.errors import RPGError

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Group:
    """The checkpoints of one shard."""

    entries: Sequence[Entry]
    is_appended: bool = False
    """Whether the layout was computed without these checkpoints."""

    def file(self, layout: Layout, dtype: TokenDtype) -> str:
        """Name of the shard's file; shards of equal names have equal content."""
        checkpoints = [(entry.file, entry.sha256) for entry in self.entries]
        text = json.dumps([layout.digest(), dtype.value, checkpoints])
        return f"shard-{hashlib.sha256(text.encode()).hexdigest()[:16]}.arrow"


def cut_into_groups(
    entries: Sequence[Entry], layout: Layout, config: ShardConfig, is_appended: bool = False
) -> list[Group]:
    """Cut checkpoints into groups, one for each shard, in order."""
    size = checkpoints_per_shard(layout, config)
    return [Group(entries[i : i + size], is_appended) for i in range(0, len(entries), size)]


def checkpoints_per_shard(layout: Layout, config: ShardConfig) -> int:
    """How many checkpoints a shard holds: as many as both limits allow, and at least one."""
    in_bytes = config.megabytes_per_shard * MEGABYTE // token_bytes(layout, config.dtype)
    return max(1, min(config.checkpoints_per_shard, in_bytes))


def write_shards(
    collection: Collection,
    groups: Sequence[Group],
    layout: Layout,
    dtype: TokenDtype,
    resume: ShardResume,
    display: ProgressDisplay,
) -> list[ShardInfo]:
    """Write the shards of these groups, except those that a killed run has finished.

    Raises:
        RPGError: naming the checkpoint that is not what was registered or does not fit the layout, or the
            shard that cannot be written.
    """
    if not groups:
        return []
    layout.digest()  # The layout keeps its digest, so that workers do not compute it again.
    shared = ray.put(layout)
    # Ray sends it with every task: without the other entries it is small.
    light_collection = collection.lightened(collection.entries[:1])

    @returns_errors
    def write(row: Row) -> Row:
        file: str = row["file"]
        finished = resume.finished(file)
        if finished is None:
            torch.set_num_threads(1)
            received: Layout = ray.get(shared)
            entries = [Entry(*pair) for pair in zip(row["files"], row["sha256"], strict=True)]
            checkpoints = _checkpoints(light_collection, entries, received if row["is_appended"] else None)
            info = write_shard(resume.shards / file, received, checkpoints, dtype)
            finished = info.bytes, info.sha256
            resume.record(file, *finished)
        return {"index": row["index"], "bytes": finished[0], "sha256": finished[1]}

    rows: list[Row] = [
        {
            "index": i,
            "file": group.file(layout, dtype),
            "files": [entry.file for entry in group.entries],
            "sha256": [entry.sha256 for entry in group.entries],
            "is_appended": group.is_appended,
        }
        for i, group in enumerate(groups)
    ]
    # The display counts every checkpoint twice, once for each pass; the first pass is done.
    total = sum(len(group.entries) for group in groups)
    done = total

    def on_row(row: Row) -> None:
        nonlocal done
        done += len(groups[row["index"]].entries)
        display.update(done, 2 * total, "tokens")

    return [
        ShardInfo(
            row["file"], written["bytes"], written["sha256"], tuple(row["files"]), layout.digest(), dtype
        )
        for row, written in zip(rows, map_rows(rows, write, on_row), strict=True)
    ]


def _checkpoints(
    collection: Collection, entries: Sequence[Entry], fits: Layout | None
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for entry in entries:
        state_dict = collection.read_checked(entry)
        if fits is not None:
            path = collection.path(entry)
            check_finite(state_dict, path)
            try:
                fits.check_fits(state_dict)
            except RPGError as error:
                raise RPGError(
                    f"{path}: cannot be appended: {error}; "
                    "python -m ray_jobs.shard CONFIG --refit makes all shards anew"
                ) from error
        yield entry.file, state_dict
