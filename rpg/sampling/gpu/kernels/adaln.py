"""The element-wise parts of the AdaLN MLP between its matrix products, one pass over a row each.

The modulation of a row is the sum of its prototype's part, a row of [N, modulations], and of the timestep's
part, [modulations], the same for all rows; shift, scale and gate are slices of it of the network's width.
"""

import triton
import triton.language as tl
from torch import Tensor

from rpg.sampling.gpu.kernels.float8 import store_row


def normalise_modulate(
    x: Tensor, modulation: Tensor, by_time: Tensor, shift: int, out: Tensor, scales: Tensor | None = None
) -> None:
    """out = LayerNorm(x) · (1 + scale) + shift, with shift at `shift` and scale right behind it.

    `x` and `out` are [N, width]; statistics are float32. With `scales`, float32 [N, 1], the result is
    out · scales, in 8 bits (see `rpg.sampling.gpu.kernels.float8`).
    """
    _launch(x, x, modulation, by_time, 0, shift, out, scales, gated=False)


def add_gated_normalise_modulate(
    x: Tensor, branch: Tensor, modulation: Tensor, by_time: Tensor, gate: int, shift: int, out: Tensor,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    """x += gate · branch in place, then as `normalise_modulate`; `gate` is where the gate starts."""
    _launch(x, branch, modulation, by_time, gate, shift, out, scales, gated=True)


def _launch(
    x: Tensor, branch: Tensor, modulation: Tensor, by_time: Tensor, gate: int, shift: int, out: Tensor,
    scales: Tensor | None, gated: bool,
) -> None:  # fmt: skip
    count, width = x.shape
    block = triton.next_power_of_2(width)
    _modulate[(count,)](
        x, branch, modulation, by_time, out, out if scales is None else scales,
        modulation.shape[1], width, gate, shift, 1e-5,
        GATED=gated, EIGHT_BITS=scales is not None, BLOCK=block, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip


@triton.jit
def _modulate(
    x, branch, modulation, by_time, out, row_scales, modulations, width, gate, shift, epsilon,
    GATED: tl.constexpr, EIGHT_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = row * width + column
    own = modulation + row * modulations + column
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    # Loads stand before the sums, which wait for the whole row.
    shifts = tl.load(own + shift, mask=inside, other=0.0).to(tl.float32)
    shifts += tl.load(by_time + shift + column, mask=inside, other=0.0)
    scales = tl.load(own + shift + width, mask=inside, other=0.0).to(tl.float32)
    scales += tl.load(by_time + shift + width + column, mask=inside, other=0.0)
    if GATED:
        gates = tl.load(own + gate, mask=inside, other=0.0).to(tl.float32)
        gates += tl.load(by_time + gate + column, mask=inside, other=0.0)
        values += gates * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + place, values.to(x.dtype.element_ty), mask=inside)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + epsilon)
    result = normal * (1.0 + scales) + shifts
    if EIGHT_BITS:
        store_row(tl.where(inside, result, 0.0), out + place, row_scales + row, inside)
    else:
        tl.store(out + place, result.to(out.dtype.element_ty), mask=inside)
