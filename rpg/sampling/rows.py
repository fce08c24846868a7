"""What a denoising batch is made of."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Tokens about to be sampled: whose they are (int64 [N] each, on the CPU), and their prototypes
    ([N, width] each, on the generator's device)."""

    seeds: Tensor
    models: Tensor
    tokens: Tensor
    prototypes: Tensor
    unconditional: Tensor

    def split(self, count: int) -> "tuple[Rows, Rows]":
        """The first `count` rows, and the others."""
        return Rows(*(part[:count] for part in self)), Rows(*(part[count:] for part in self))

    def padded(self, count: int) -> "Rows":
        """These rows and as many of zeros as make `count`."""
        missing = count - len(self.models)
        if not missing:
            return self
        return Rows(*(torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) for part in self))

    @staticmethod
    def joined(pieces: "Sequence[Rows]") -> "Rows":
        """The rows of all `pieces`, in order."""
        if len(pieces) == 1:
            return pieces[0]
        return Rows(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
