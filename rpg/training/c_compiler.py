"""Whether `torch.compile` can serve a GPU on this machine."""

import shutil

_C_COMPILERS = ("cc", "gcc", "clang")


def has_c_compiler() -> bool:
    """Triton builds the starter of its kernels with one."""
    return any(shutil.which(name) for name in _C_COMPILERS)
