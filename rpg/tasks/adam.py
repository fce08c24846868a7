"""Adam for many models at once, whose parameters are stacked along a leading dimension."""

import math

import torch
from torch import Tensor

_BETA1, _BETA2, _EPSILON, _WARMUP_STEPS = 0.9, 0.99, 1e-8, 20


class SideBySideAdam:
    """Adam (Kingma and Ba, arXiv 1412.6980) with a warm-up and then half a cosine down to zero.

    Adam works element by element, so the models that are updated together stay independent of each other.
    """

    def __init__(self, leaves: list[Tensor], learning_rate: float, steps: int) -> None:
        """Update `leaves` in place, `steps` times in all, with `learning_rate` at its peak."""
        self._leaves = leaves
        self._first = [torch.zeros_like(leaf) for leaf in leaves]
        self._second = [torch.zeros_like(leaf) for leaf in leaves]
        self._peak, self._steps, self._step = learning_rate, steps, 0

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...]) -> None:
        """Take the next step."""
        self._step += 1
        step = self._step
        rate = self._peak * min(1.0, step / _WARMUP_STEPS)
        rate *= 0.5 * (1 + math.cos(math.pi * step / self._steps))
        torch._foreach_lerp_(self._first, gradients, 1 - _BETA1)
        torch._foreach_mul_(self._second, _BETA2)
        torch._foreach_addcmul_(self._second, gradients, gradients, value=1 - _BETA2)
        scale = torch._foreach_div(self._second, 1 - _BETA2**step)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, _EPSILON)
        torch._foreach_addcdiv_(self._leaves, self._first, scale, value=-rate / (1 - _BETA1**step))
