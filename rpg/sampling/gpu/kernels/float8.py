"""Rows as 8-bit floats (E4M3) with a scale each, as products in 8 bits take them.

A row's largest magnitude becomes the largest number that the format has, so what rounding does to a row
depends on that row alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST = 448.0
"""The largest E4M3 number."""
DTYPE = torch.float8_e4m3fn


def quantise_rows(x: Tensor, out: Tensor, scales: Tensor, silu: bool = False) -> None:
    """out · scales = x, or SiLU(x), but for rounding.

    Args:
        x: [N, width].
        out: [N, width] of `DTYPE`.
        scales: float32 [N, 1].
        silu: whether to apply SiLU first.
    """
    count, width = x.shape
    block = triton.next_power_of_2(width)
    _quantise[(count,)](
        x, out, scales, width, SILU=silu, BLOCK=block, num_warps=max(1, min(16, block // 512))
    )


@triton.jit
def _quantise(x, out, scales, width, SILU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    values = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        values = values / (1.0 + tl.exp(-values))
    store_row(values, out + row * width + column, scales + row, inside)


@triton.jit
def store_row(values, out, scale, inside):
    """Write one row, float32 and zero outside of `inside`, and its scale."""
    largest = tl.max(tl.abs(values), 0)
    # A row of zeros keeps a scale that can be divided by.
    factor = 448.0 / tl.maximum(largest, 1e-30)
    tl.store(out, (values * factor).to(out.dtype.element_ty), mask=inside)
    tl.store(scale, 1.0 / factor)
