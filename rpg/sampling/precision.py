"""Which sampling loop, and which precision of its products, suits a generator's device and sizes."""

import torch
from torch.nn import functional as F

from rpg.config import SamplingConfig, SamplingPrecision
from rpg.generator.denoiser.direct import DirectPrediction
from rpg.generator.denoiser.unet import ConditionalUNet
from rpg.generator.generator import Generator

_EIGHT_BIT_CAPABILITY = (8, 9)
_EIGHT_BIT_MULTIPLE = 16
"""Rows of factors have a multiple of so many values."""


def samples_on_gpu(generator: Generator, sampling: SamplingConfig) -> bool:
    """Whether `rpg.sampling.gpu.loop` samples; if not, `rpg.sampling.plain_loop` does.

    The fused loop takes any condition, positions, prototype width and solver, but not every denoiser.
    """
    if generator.positions.device.type != "cuda" or sampling.precision == SamplingPrecision.float32:
        return False
    if isinstance(generator.denoiser, DirectPrediction):
        # One product a token: nothing to fuse.
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    if isinstance(generator.denoiser, ConditionalUNet):
        from rpg.sampling.gpu.unet import UNetOnGPU

        return UNetOnGPU.serves(generator.denoiser, generator.layout.token_size)
    return True


def used_precision(generator: Generator, sampling: SamplingConfig) -> SamplingPrecision:
    """The arithmetic of the denoiser's products, where the generator lies now: never `auto`."""
    if not samples_on_gpu(generator, sampling):
        return SamplingPrecision.float32
    if samples_in_float8(generator, sampling):
        return SamplingPrecision.float8
    return SamplingPrecision.bfloat16


def samples_in_float8(generator: Generator, sampling: SamplingConfig) -> bool:
    """Whether the GPU's loop is to multiply 8-bit floats: asked for, and possible with this GPU, this PyTorch
    (from 2.10 on) and these sizes."""
    sizes = generator.layout.token_size, generator.config.denoiser.width
    return (
        sampling.precision == SamplingPrecision.float8
        and hasattr(F, "scaled_mm")
        and torch.cuda.get_device_capability(generator.positions.device) >= _EIGHT_BIT_CAPABILITY
        and not any(size % _EIGHT_BIT_MULTIPLE for size in sizes)
    )
