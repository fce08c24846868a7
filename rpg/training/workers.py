"""The workers that train a generator together, each on its rows of every batch; BatchNorm over all rows."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from rpg.errors import RPGError


@dataclass(frozen=True)
class Workers:
    """How many workers there are, and which of them this process is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def current(cls) -> "Workers":
        """The workers of PyTorch's default process group; a single one where there is no group."""
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def rows(self, total: int) -> range:
        """This worker's share of `total` rows; every row is in one worker's share.

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
        """The first worker's `value`; all workers must call this."""
        if self.count == 1:
            return value
        # NCCL takes tensors on a GPU alone.
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        own = value if self.rank == 0 else 0.0
        return float(self.sum(torch.tensor(own, dtype=torch.float64, device=device)))


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose training statistics are those of every worker's rows together.

    PyTorch's SyncBatchNorm does the same, but only on GPUs.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [N, C, L]; N may differ between workers."""
        if not self.training:
            return super().forward(input)
        # Under autocast the sums would be in half precision.
        with torch.autocast(input.device.type, enabled=False):
            x = input.float()
            count = x.new_full((1,), x.shape[0] * x.shape[2])
            sums = _summed(torch.cat([x.sum((0, 2)), count]))
            total = sums[-1].detach()
            mean = sums[:-1] / total
            centred = x - mean[:, None]
            variance = _summed((centred**2).sum((0, 2))) / total
            self._track(mean.detach(), variance.detach() * total / (total - 1))
            normal = centred * torch.rsqrt(variance + self.eps)[:, None]
            return normal * self.weight[:, None] + self.bias[:, None]

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def _summed(values: Tensor) -> Tensor:
    """The sum over all workers, through which gradients flow back to each of them."""
    total: Tensor = all_reduce(values)  # type: ignore[no-untyped-call]
    return total


def normalise_globally(module: nn.Module) -> None:
    """Turn every `nn.BatchNorm1d` in `module` into a `GlobalBatchNorm1d`; parameters and buffers stay.

    Then training does not depend on how many workers there are.
    """
    for part in module.modules():
        if type(part) is nn.BatchNorm1d:
            part.__class__ = GlobalBatchNorm1d
