"""Originals with noise added: the yardstick that similarity is read against, as published.

A copy with a little noise is what a generator that memorises would produce at best; generated networks
should be less similar to the originals than that, at the same accuracy.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_PRE_MEAN = 0.95
_FLOOR = 0.05
_CLIP = 0.001


def noised(state_dict: Mapping[str, Tensor], level: float, generator: torch.Generator) -> dict[str, Tensor]:
    """A copy of a checkpoint with Gaussian noise of `level` in units of each tensor's standard deviation.

    As in the published similarity script: normalise a tensor by its own mean and standard deviation, add
    `level` · N(0, 1), denormalise. BatchNorm's `running_var` passes through log(v / pre_mean + 0.05) with
    pre_mean = 0.95 · mean(v), and back clipped at 0.001 · pre_mean, so that it stays positive. Integer, bool,
    empty and one-element tensors are left as they are.

    Args:
        state_dict: the original; not changed.
        level: 0.01 … 0.05 in the paper.
        generator: where the noise comes from (a CPU generator); the same seed gives the same copy.

    Returns:
        The same names in the same order, with the same shapes, dtypes and devices. Names that share one
        tensor (tied weights) get the same noise.
    """
    result: dict[str, Tensor] = {}
    done: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    for name, tensor in state_dict.items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() <= 1 or not tensor.is_floating_point():
            result[name] = tensor.clone()
        elif identity in done:
            result[name] = done[identity]
        else:
            done[identity] = result[name] = _noised(name, tensor, level, generator)
    return result


def _noised(name: str, tensor: Tensor, level: float, generator: torch.Generator) -> Tensor:
    value = tensor.detach().to("cpu", torch.float32)
    noise = torch.randn(value.shape, generator=generator) * level
    pre_mean = _PRE_MEAN * value.mean()
    if name.endswith("running_var") and pre_mean > 0:
        logarithm = torch.log(value / pre_mean + _FLOOR)
        # mean + std · ((v − mean) / std + noise) is v + std · noise, also where the std is 0.
        logarithm = logarithm + logarithm.std() * noise
        value = (torch.exp(logarithm) - _FLOOR).clamp(min=_CLIP) * pre_mean
    else:
        value = value + value.std() * noise
    return value.to(tensor.device, tensor.dtype)
