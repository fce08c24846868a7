"""The arithmetic of a training step: its precision, and whose matrix products."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import torch

from rpg.config import Precision

_CPU_INFO = Path("/proc/cpuinfo")
_CHECKED_SIZE = 512
_LARGEST_ERROR = 1e-5
"""Of float32 products it is 1e-6, with factors in bfloat16 2e-3."""


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run a block's matrix products with `precision` on `device`.

    `float32` is plain float32 everywhere, `bfloat16` is autocast. `auto` is bfloat16 autocast on a GPU. On a
    CPU `auto` keeps float32 tensors, and takes oneDNN for their products ("medium") where that is better.
    """
    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        if rounds_to_bfloat16(precision, device):
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if precision == Precision.auto and device.type == "cpu" and onednn_is_better():
            torch.set_float32_matmul_precision("medium")
            stack.callback(torch.set_float32_matmul_precision, before)
        yield


def rounds_to_bfloat16(precision: Precision, device: torch.device) -> bool:
    """Whether `arithmetic` rounds what a matrix product is made of to bfloat16."""
    return precision == Precision.bfloat16 or (precision == Precision.auto and device.type == "cuda")


@cache
def onednn_is_better() -> bool:
    """Whether this is an AMD CPU, where oneDNN is faster than PyTorch's default, and its products are exact.

    PyTorch's default, MKL, is slower on AMD's processors, above all beside other work, and faster on Intel's
    (docs/ablations.md). The processor decides and no measurement of time, because a training that goes on
    after a crash must find the same again to come to the same bytes.
    """
    if not _is_amd():
        return False
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, _CHECKED_SIZE, _CHECKED_SIZE, generator=random)
    default = a @ b
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (a @ b - default).norm() / default.norm()
    finally:
        torch.set_float32_matmul_precision(before)
    return bool(error < _LARGEST_ERROR)


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in _CPU_INFO.read_text()
    except OSError:  # Not Linux.
        return False
