"""The arithmetic of the training step."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from rpg.config import Precision


@contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Run a block's matrix products with `precision` on `device`.

    `float32` is plain float32 everywhere, `bfloat16` is autocast. `auto` is bfloat16 autocast on a GPU; on a
    CPU it keeps float32 tensors and lets PyTorch choose oneDNN for their products ("medium"), more than twice
    as fast as its default on some processors (docs/ablations.md); processors with bfloat16 matrix units may
    round the factors.
    """
    autocast = precision == Precision.bfloat16 or (precision == Precision.auto and device.type == "cuda")
    before = torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        if autocast:
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if precision == Precision.auto and device.type == "cpu":
            torch.set_float32_matmul_precision("medium")
            stack.callback(torch.set_float32_matmul_precision, before)
        yield
