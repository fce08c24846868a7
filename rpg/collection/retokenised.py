"""A sharded collection read at another token size, without writing new shards."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rpg.collection.shards import ShardedCollection
from rpg.config import TokenCut
from rpg.errors import RPGError


class Retokenised:
    """The same checkpoints, cut into tokens of another size as they are read.

    The values of a tensor are stored in order in its tokens, with padding only at its end. So each token of
    another size is one stretch of the stored values of its checkpoint.

    Attributes:
        layout: the collection's, at the new token size.
        names: of the checkpoints, in order.
        conditions: float32 [checkpoints, width], or None if the collection has none.
        encoder: digest of the text encoder that the conditions came from, or empty.
        states: permutation states, int64 [checkpoints], or None if the collection has none.
    """

    def __init__(self, shards: ShardedCollection, token_size: int) -> None:
        """Cut the tokens of `shards` to `token_size` values.

        Raises:
            RPGError: if a token would be larger than the network, or if tokens are cut by output channel, for
                then they are padded within tensors.
        """
        if shards.layout.cut == TokenCut.by_output_channel:
            raise RPGError(
                "shard.token_size: cannot be changed for tokens cut by_output_channel; expected shard.cut "
                "by_tensor or flat"
            )
        self.layout = shards.layout.with_token_size(token_size)
        self.names = shards.names
        self.conditions = shards.conditions
        self.encoder = shards.encoder
        self.states = shards.states
        self._shards = shards
        stored = {spec.name: spec.first_token for spec in shards.layout.specs}
        # Where each token's values begin in the row of all stored values of a checkpoint.
        starts = [
            stored[spec.name] * shards.layout.token_size + token * token_size
            for spec in self.layout.specs
            for token in range(spec.tokens)
        ]
        if self.layout.cut == TokenCut.flat:
            starts = [token * token_size for token in range(self.layout.tokens)]
        self._starts = np.array(starts, dtype=np.int64)
        self._lengths = self.layout.lengths().numpy()

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, checkpoint: int, tokens: Tensor | Sequence[int]) -> Tensor:
        """Read some tokens of one checkpoint: float32 [K, token_size]."""
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
            [B, K, token_size] in the dtype that they are stored in, padded with 0.

        Raises:
            IndexError: if there is no such checkpoint or token.
        """
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.layout.tokens:
            raise IndexError(f"tokens: expected 0 <= index < {self.layout.tokens}")
        old, new = self._shards.layout.token_size, self.layout.token_size
        starts, lengths = self._starts[tokens], self._lengths[tokens]
        # The stored tokens that a stretch of `new` values can touch, wherever it begins.
        touched = np.arange((new + old - 2) // old + 1)
        last = self._shards.layout.tokens - 1
        rows = np.minimum(starts[..., None] // old + touched, last)
        values = self._shards.read_batch(checkpoints, rows.reshape(len(rows), -1))
        values = values.view(*tokens.shape, len(touched) * old)
        at = torch.from_numpy(starts % old)[..., None] + torch.arange(new)
        real = torch.arange(new) < torch.from_numpy(lengths)[..., None]
        cut = values.gather(-1, at).masked_fill_(~real, 0.0)
        return cut.pin_memory() if pinned else cut


AnyShards = ShardedCollection | Retokenised
"""Checkpoints as tokens, of the stored size or another."""
