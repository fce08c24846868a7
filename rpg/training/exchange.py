"""The exchange of gradients between training workers, piece by piece while the backward pass goes on."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 25 * 2**20
"""Gradients are sent once there are so many: few are left to send when the backward pass ends, and a
collective of this size runs at the full rate of a link between GPUs."""


@dataclass
class _Bucket:
    """Some of the parameters, whose gradients are exchanged together."""

    parameters: list[nn.Parameter]
    sent: Tensor
    """[values], what is exchanged."""
    parts: list[Tensor]
    """`sent`, cut into the gradients of the parameters."""
    gradients: Tensor
    """[values], in the type of the parameters; `sent` itself, if that has this type."""
    views: list[Tensor]
    """`gradients`, cut likewise."""
    missing: int = 0
    """How many gradients this backward pass has yet to compute."""
    used: list[bool] = field(default_factory=list)
    """Which parameters have a gradient."""
    work: Any = None


class GradientExchange:
    """Sums a module's gradients over the workers, clips them, and leaves them in the parameters' `grad`.

    Every worker calls `begin`, runs its backward pass, and calls `finish`. As soon as the gradients of a
    bucket are there, they are copied into a buffer and sent, in the same order by every worker. PyTorch's
    DistributedDataParallel does the same; here the buffer may be in half precision, clipping reads it in
    place of the gradients, and all of it can be captured in a CUDA graph.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        """Exchange the gradients of `module`, whose parameters have one type and stay where they are.

        Args:
            module: the same for every worker.
            dtype: what gradients are rounded to when they are sent.
        """
        # A backward pass computes the last layers' gradients first.
        parameters = [each for each in module.parameters() if each.requires_grad][::-1]
        self._buckets: list[_Bucket] = []
        self._sent = 0
        most, group = _BUCKET_BYTES // dtype.itemsize, []
        for index, parameter in enumerate(parameters):
            group.append(parameter)
            if index + 1 == len(parameters) or sum(each.numel() for each in group) >= most:
                self._buckets.append(_bucket(group, dtype))
                group = []
        # The parameters are to be freed when nothing but their hooks knows them.
        arrived = weakref.WeakMethod(self._arrived)
        for number, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(partial(_tell, arrived, number))

    def begin(self) -> None:
        """Expect the gradients of a backward pass."""
        self._sent = 0
        for bucket in self._buckets:
            bucket.missing = len(bucket.parameters)

    @torch.no_grad()
    def finish(self, limit: float) -> Tensor:
        """Set every `grad` to the sum over the workers, scaled to a norm of at most `limit` in all.

        Returns:
            The norm before it was scaled, scalar.
        """
        # Parameters that took no part have no gradient, and their buckets are still here.
        while self._sent < len(self._buckets):
            self._send()
        for bucket in self._buckets:
            bucket.work.wait()
            bucket.work = None
        norms = [torch.linalg.vector_norm(bucket.sent, dtype=torch.float32) for bucket in self._buckets]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        # A dimension makes float32 the type of the product, which a scalar would not.
        scale = (limit / (norm + 1e-6)).clamp(max=1.0).view(1)
        for bucket in self._buckets:
            torch.mul(bucket.sent, scale, out=bucket.gradients)
            for parameter, view, used in zip(bucket.parameters, bucket.views, bucket.used, strict=True):
                parameter.grad = view if used else None
        return norm

    def _arrived(self, number: int) -> None:
        """Count a gradient of the bucket with this number."""
        self._buckets[number].missing -= 1
        while self._sent < len(self._buckets) and not self._buckets[self._sent].missing:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """Begin to exchange the next bucket."""
        bucket = self._buckets[self._sent]
        self._sent += 1
        found = [parameter.grad for parameter in bucket.parameters]
        bucket.used = [gradient is not None for gradient in found]
        pairs = list(zip(bucket.parts, found, strict=True))
        for part, gradient in pairs:
            if gradient is None:
                part.zero_()
        there = [(part, gradient) for part, gradient in pairs if gradient is not None]
        if there:
            torch._foreach_copy_([part for part, _ in there], [gradient for _, gradient in there])
        for parameter in bucket.parameters:
            parameter.grad = None
        bucket.work = dist.all_reduce(bucket.sent, async_op=True)


def _tell(arrived: Callable[[], Callable[[int], None] | None], number: int, parameter: Tensor) -> None:
    method = arrived()
    if method is not None:
        method(number)


def _bucket(parameters: list[nn.Parameter], dtype: torch.dtype) -> _Bucket:
    like = parameters[0]
    size = sum(parameter.numel() for parameter in parameters)
    sent = torch.zeros(size, dtype=dtype, device=like.device)
    gradients = sent if dtype == like.dtype else torch.zeros(size, dtype=like.dtype, device=like.device)
    return _Bucket(parameters, sent, _cut(sent, parameters), gradients, _cut(gradients, parameters))


def _cut(flat: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    pieces = flat.split([parameter.numel() for parameter in parameters])
    return [piece.view_as(parameter) for piece, parameter in zip(pieces, parameters, strict=True)]
