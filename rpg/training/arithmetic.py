"""The arithmetic of a training step: its precision, and whose matrix products."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import Tensor

from rpg.config import Precision

_MEASURED_SIZE = 512
_MEASUREMENTS = 5
_FASTER = 1.3
_LARGEST_ERROR = 1e-5
"""Of float32 products it is 1e-6, with factors in bfloat16 2e-3."""


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run a block's matrix products with `precision` on `device`.

    `float32` is plain float32 everywhere, `bfloat16` is autocast. `auto` is bfloat16 autocast on a GPU. On a
    CPU `auto` keeps float32 tensors, and takes oneDNN for their products ("medium") where that is better.
    """
    autocast = precision == Precision.bfloat16 or (precision == Precision.auto and device.type == "cuda")
    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        if autocast:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if precision == Precision.auto and device.type == "cpu" and onednn_is_better():
            torch.set_float32_matmul_precision("medium")
            stack.callback(torch.set_float32_matmul_precision, before)
        yield


@cache
def onednn_is_better() -> bool:
    """Whether oneDNN's products of float32 are faster than PyTorch's default on this CPU, and as exact.

    On AMD's processors they are more than twice as fast, on Intel's they are not (docs/ablations.md), and
    those with bfloat16 matrix units round the factors. A few milliseconds of measuring tell. What is only a
    little faster is not taken, so that every start of a training finds the same.
    """
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, _MEASURED_SIZE, _MEASURED_SIZE, generator=random)
    before = torch.get_float32_matmul_precision()
    seconds: dict[str, float] = {}
    products: dict[str, Tensor] = {}
    try:
        for _ in range(_MEASUREMENTS):
            for precision in ("highest", "medium"):
                torch.set_float32_matmul_precision(precision)
                start = time.perf_counter()
                products[precision] = a @ b
                took = time.perf_counter() - start
                seconds[precision] = min(took, seconds.get(precision, took))
    finally:
        torch.set_float32_matmul_precision(before)
    error = (products["medium"] - products["highest"]).norm() / products["highest"].norm()
    return bool(error < _LARGEST_ERROR) and seconds["highest"] > _FASTER * seconds["medium"]
