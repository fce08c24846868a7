"""Whether `torch.compile` can serve a GPU on this machine."""

import shutil
from importlib.util import find_spec

_C_COMPILERS = ("cc", "gcc", "clang")


def has_gpu_compiler() -> bool:
    """Whether Triton is installed, and the C compiler that it needs to build code that launches kernels."""
    return find_spec("triton") is not None and any(shutil.which(name) for name in _C_COMPILERS)
