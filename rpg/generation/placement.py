"""Which sampling loop suits a generator's device and sizes."""

from rpg.config import Precision, SamplingConfig
from rpg.generator.denoiser.unet import ConditionalUNet
from rpg.generator.generator import Generator


def samples_on_gpu(generator: Generator, sampling: SamplingConfig) -> bool:
    """Whether `rpg.generation.gpu_loop` samples, in bfloat16; if not, `rpg.generation.plain_loop` does."""
    if generator.positions.device.type != "cuda" or sampling.precision == Precision.float32:
        return False
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    if isinstance(generator.denoiser, ConditionalUNet):
        from rpg.generator.denoiser.unet_gpu import UNetOnGPU

        return UNetOnGPU.serves(generator.denoiser, generator.layout.token_size)
    return True
