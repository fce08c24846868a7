"""The workers that train one generator together, each on its own rows of every batch."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from rpg.errors import RPGError


@dataclass(frozen=True)
class Workers:
    """How many there are, and which of them this process is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Workers":
        """Those of PyTorch's default process group; one where there is none."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def rows(self, total: int) -> range:
        """This worker's share of `total` rows: every row is in one worker's share.

        Raises:
            RPGError: if there are fewer rows than workers.
        """
        if total < self.count:
            raise RPGError(
                f"train.checkpoints_per_step: expected at least one for each of {self.count} "
                f"training workers, got {total}"
            )
        return range(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every worker's `tensor`, the same bits for all of them."""
        if self.count == 1:
            return tensor
        result = tensor.detach().clone()
        dist.all_reduce(result)
        return result

    def from_first(self, value: float) -> float:
        """The first worker's `value`."""
        return float(self.sum(torch.tensor(value if self.rank == 0 else 0.0, dtype=torch.float64)))
