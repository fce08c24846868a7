"""BatchNorm over the rows of all workers, so that training does not depend on how many there are."""

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """`nn.BatchNorm1d` whose training statistics are those of every worker's rows together.

    PyTorch's SyncBatchNorm does the same on GPUs alone.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [N, C, L]; N may differ between workers."""
        if not self.training:
            return super().forward(input)
        # Autocast would sum in half precision.
        with torch.autocast(input.device.type, enabled=False):
            x = input.float()
            count = x.new_tensor([x.shape[0] * x.shape[2]])
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
    """Make every `nn.BatchNorm1d` in `module` a `GlobalBatchNorm1d`, with the same parameters and buffers."""
    for part in module.modules():
        if type(part) is nn.BatchNorm1d:
            part.__class__ = GlobalBatchNorm1d
