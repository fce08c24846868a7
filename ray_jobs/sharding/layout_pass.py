"""First pass of stage `shard`: the layout, from statistics that Ray Data's workers gather in parts.

Which checkpoints make a part depends on the collection alone, and parts are merged in the collection's order.
So the layout does not depend on the cluster or on which worker was faster.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ray_jobs.ray_data import Row, map_in_order, returns_errors
from rpg.collection.checkpoint import check_finite
from rpg.collection.collection import Collection, Entry
from rpg.collection.companions import Companions
from rpg.collection.layout import Layout
from rpg.collection.statistics import LayoutStatistics, StatisticsPart
from rpg.commands.progress import ProgressDisplay
from rpg.config import ShardConfig
from rpg.errors import RPGError
from rpg.storage.directories import remove_directory
from rpg.storage.errors import storage_errors_for
from rpg.storage.files import replacing_file
from rpg.storage.locations import AnyPath, fetched
from rpg.threads import one_thread

_PART_BYTES = 64_000_000
PART_LIMITS = (16, 256)
"""Fewest and most checkpoints of a part. A small part wastes time: its means are as large as two float32
checkpoints, and its task costs some milliseconds."""


def compute_layout(
    collection: Collection,
    entries: Sequence[Entry],
    config: ShardConfig,
    companions: Companions,
    display: ProgressDisplay,
    scratch: AnyPath,
    part_limits: tuple[int, int] = PART_LIMITS,
) -> Layout:
    """The layout of these checkpoints; each worker holds one, the reference and the mean at a time.

    Args:
        collection: where the checkpoints are.
        entries: the training checkpoints, in order; the first is the reference for names and shapes.
        config: token size, normalisation and cut.
        companions: the files beside the first one's weights.
        display: shows how many checkpoints have been read, as the first half of the stage.
        scratch: directory or URI that all workers can write to, for the means of the parts. It is removed.
        part_limits: fewest and most checkpoints of a part.

    Raises:
        RPGError: naming the checkpoint that is not what was registered, does not fit the first or is not
            finite; naming the file of means that cannot be written or read; if `shard.token_size` exceeds the
            network, or if all checkpoints are equal.
    """
    reference = entries[0]
    # Ray sends it with every task: without the other entries it is small.
    light_collection = collection.lightened([reference])

    @returns_errors
    def statistics(row: Row) -> Row:
        torch.set_num_threads(1)
        # Every worker reads the reference itself: Ray would send tensors that share storage as separate ones.
        found = LayoutStatistics(light_collection.read(reference))
        for file, digest in zip(row["files"], row["sha256"], strict=True):
            entry = Entry(file, digest)
            state_dict = light_collection.read_checked(entry)
            check_finite(state_dict, light_collection.path(entry))
            found.update(state_dict)
        part = found.part()
        # Of a large network the means are gigabytes, which Ray would copy into an Arrow block and from there
        # into the object store.
        with replacing_file(_means_file(scratch, row["index"]), synced=False) as temporary:
            part.write_means(temporary)
        return {"index": row["index"], "reference": part.reference, "count": part.count, "sums": part.sums}

    first = collection.read(reference)
    size = _part_size(first, part_limits)
    rows = [
        {
            "index": i,
            "files": [entry.file for entry in entries[i : i + size]],
            "sha256": [entry.sha256 for entry in entries[i : i + size]],
        }
        for i in range(0, len(entries), size)
    ]
    # The sum of a large tensor depends on how many threads share it, and the layout must not.
    try:
        with one_thread():
            total = LayoutStatistics(first)
            # The statistics have a copy.
            del first
            for row in map_in_order(rows, statistics):
                path = _means_file(scratch, row["index"])
                with fetched(path) as means:
                    total.merge(StatisticsPart(row["reference"], row["count"], row["sums"], means))
                with storage_errors_for(path, "cannot be removed"):
                    path.unlink()
                display.update(total.count, 2 * len(entries), "layout")
            # A large network's centre has the room then.
            total.release_reference()
            layout = total.layout(config.token_size, config.normalisation)
    finally:
        remove_directory(scratch)
    values = sum(spec.numel for spec in layout.specs)
    if config.token_size > values:
        raise RPGError(
            f"shard.token_size: expected at most {values}, the values in the whole network, "
            f"got {config.token_size}"
        )
    if layout.tokens == 0:
        raise RPGError(f"{collection.root}: all training checkpoints are equal: there is nothing to learn")
    layout = layout.with_companions(companions)
    return layout.with_token_size(config.token_size, config.cut) if config.cut != layout.cut else layout


def _means_file(scratch: AnyPath, index: int) -> AnyPath:
    return scratch / f"means-{index:06d}.f64"


def _part_size(state_dict: dict[str, Tensor], limits: tuple[int, int]) -> int:
    """Checkpoints of a part, given one of them; all have the same size."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in state_dict.values())
    return int(np.clip(_PART_BYTES // max(size, 1), *limits))
