"""A collection as tokens on disk: Arrow shards, their manifest, and random access to any tokens.

A directory holds `shards.json` and `entries.arrow` (`rpg.collection.manifest`), the shards that they name,
`layout.json` and `centre.safetensors`.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.collection.manifest import MANIFEST_FILE, ShardManifest, read_manifest
from rpg.collection.shard_file import as_stored, empty_tokens, open_shard
from rpg.collection.verified import damage
from rpg.errors import RPGError

_BYTES_FOR_A_THREAD = 2**20
"""Bytes to read of each checkpoint above which threads read several at once. For fewer bytes starting threads
takes longer than it saves."""


class ShardedCollection:
    """Random access to the tokens of a collection's checkpoints.

    Attributes:
        directory: where the shards are.
        layout: that turns tokens back into checkpoints.
        dtype: the tokens' storage type.
        names: of the checkpoints, in order.
        conditions: float32 [checkpoints, width], or None if the collection has none.
        encoder: digest of the text encoder that the conditions came from, or empty.
        states: permutation states, int64 [checkpoints], or None if the collection has none.
    """

    def __init__(self, directory: Path, layout: Layout, manifest: ShardManifest) -> None:
        """Map the shards of a directory; `open` reads the layout and the manifest that this needs."""
        self.directory = directory
        self.layout = layout
        self.dtype = manifest.dtype
        self.names = manifest.names
        self.conditions = manifest.conditions
        self.encoder = manifest.encoder
        self.states = manifest.states
        self._shards = manifest.shards
        self._places = manifest.places
        self._stored = [
            open_shard(directory / shard.file, layout, shard.dtype, len(shard.checkpoints))
            for shard in manifest.shards
        ]

    @classmethod
    def open(cls, directory: Path, verify: bool = True) -> "ShardedCollection":
        """Open a directory of shards; tokens are read when asked for.

        Args:
            directory: of the shards, on a local file system.
            verify: compare the SHA-256 of every shard that was never verified or has changed since.

        Raises:
            RPGError: naming the file that is missing, cut short, damaged, of another version, not what it
                should be, or does not belong to the others.
        """
        manifest = read_manifest(directory)
        layout = Layout.load(directory)
        if layout.digest() != manifest.layout:
            raise RPGError(
                f"{directory / MANIFEST_FILE}: the shards were made with another layout "
                "than the one beside them"
            )
        if verify:
            _refuse(damage(directory, manifest.shards))
        return cls(directory, layout, manifest)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, checkpoint: int, tokens: Tensor | Sequence[int]) -> Tensor:
        """Read K tokens of one checkpoint: float32 [K, token_size]. Only the pages with them are read."""
        return self.read_batch([checkpoint], np.asarray(tokens, dtype=np.int64)[None])[0].float()

    def read_batch(
        self, checkpoints: Sequence[int], tokens: npt.NDArray[np.int64], pinned: bool = False
    ) -> Tensor:
        """Read K tokens of each of B checkpoints; reads only the pages that contain them.

        Args:
            checkpoints: [B], indices into `names`.
            tokens: int64 [B, K], token indices, a row for each checkpoint.
            pinned: whether to read into page-locked memory, from which a GPU can copy while it computes.

        Returns:
            [B, K, token_size] in the dtype that they are stored in.

        Raises:
            IndexError: if there is no such checkpoint or token.
        """
        if len(checkpoints) and not 0 <= min(checkpoints) <= max(checkpoints) < len(self):
            raise IndexError(f"checkpoints: expected 0 <= index < {len(self)}")
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.layout.tokens:
            raise IndexError(f"tokens: expected 0 <= index < {self.layout.tokens}")
        result = empty_tokens((*tokens.shape, self.layout.token_size), self.dtype, pinned)

        def read(rows: npt.NDArray[Any], checkpoint: int, indices: npt.NDArray[np.int64]) -> None:
            shard, batch = self._places[checkpoint]
            values = self._stored[shard][batch]
            # The indices are in range. In its default mode NumPy would check them and use a second buffer.
            values.take(indices, 0, rows, "clip")

        threads = torch.get_num_threads() if result[:1].nbytes > _BYTES_FOR_A_THREAD else 1
        if threads == 1:
            deque(map(read, as_stored(result), checkpoints, tokens), maxlen=0)
        else:
            with ThreadPoolExecutor(threads) as pool:
                deque(pool.map(read, as_stored(result), checkpoints, tokens), maxlen=0)
        return result

    def verify(self) -> None:
        """Read all shards, whether they have changed or not, and compare them with the manifest.

        Raises:
            RPGError: naming the first shard that cannot be read or whose SHA-256 differs.
        """
        _refuse(damage(self.directory, self._shards, again=True))


def _refuse(damaged: dict[str, str]) -> None:
    for line in damaged.values():
        raise RPGError(line)
