"""1-D convolution over tokens as one matrix product with overlapping rows, its neighbours fused into it.

Activations lie channels-last, [N, pitch, channels], with zeros before and behind a token's positions. The
inputs of `group` neighbouring outputs are then (group + kernel - 1) · channels values in a row, and the next
group's start group · channels values further: a matrix whose rows overlap in memory, which no one has to
build. Its product with a banded (Toeplitz) matrix of the weights, [(group + kernel - 1) · channels,
group · outputs], is the convolution of the whole group. Larger groups read each input less often, at the
price of products with the band's zeros.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

PADDING = 16
"""Positions of a row behind the token's own, `kernel // 2` of them before it."""


@dataclass(frozen=True)
class ToeplitzConv:
    """A convolution's weights as the banded matrix, and how its product is cut into blocks."""

    matrix: Tensor
    """[K, group · outputs], K a multiple of `block_k`."""
    bias: Tensor
    """float32 [outputs]."""
    inputs: int
    outputs: int
    group: int
    margin: int
    """Positions before a token: kernel // 2."""
    block_m: int
    block_n: int
    block_k: int

    @staticmethod
    def of(
        weight: Tensor, bias: Tensor, group: int, dtype: torch.dtype, block_m: int = 128, block_n: int = 128,
    ) -> "ToeplitzConv":  # fmt: skip
        """Of a convolution's `weight` [outputs, inputs, kernel], kernel odd, and `bias` [outputs]."""
        outputs, inputs, kernel = weight.shape
        rows = (group + kernel - 1) * inputs
        block_k = min(64, triton.next_power_of_2(rows))
        padded = triton.cdiv(rows, block_k) * block_k
        matrix = weight.new_zeros(padded, group * outputs)
        taps = weight.permute(2, 1, 0).reshape(kernel * inputs, outputs)
        for i in range(group):
            matrix[i * inputs : (i + kernel) * inputs, i * outputs : (i + 1) * outputs] = taps
        return ToeplitzConv(
            matrix.to(dtype).contiguous(), bias.float().contiguous(), inputs, outputs, group, kernel // 2,
            block_m, min(block_n, group * outputs), block_k,
        )  # fmt: skip

    def __call__(
        self,
        x: Tensor,
        out: Tensor,
        condition: Tensor | None = None,
        time: Tensor | None = None,
        skip: Tensor | None = None,
        kept: Tensor | None = None,
    ) -> None:
        """Convolve `x` into `out`.

        With `condition` and `time`, y = ELU(convolution + bias) is written to `kept` where there is one, and
        (y + skip + condition) · time, the next layer's input, to `out`; without, convolution + bias alone.

        Args:
            x: [N, length + PADDING, inputs], zero outside the token's positions.
            out: [N, length + PADDING, outputs]; the last layer's is [N, length].
            condition: [N, length].
            time: float32 [length].
            skip: like `out`.
            kept: like `out`.
        """
        count, pitch, _ = x.shape
        length = pitch - PADDING
        groups = length // self.group
        columns = self.group * self.outputs
        blocks = triton.cdiv(groups, self.block_m) * triton.cdiv(columns, self.block_n)
        middle = condition is not None and time is not None
        _conv[(count * blocks,)](
            x, self.matrix, self.bias, out,
            condition if middle else x, time if middle else x,
            x if skip is None else skip, x if kept is None else kept,
            blocks, groups, length, pitch, self.margin,
            INPUTS=self.inputs, OUTPUTS=self.outputs, GROUP=self.group, K=self.matrix.shape[0],
            MIDDLE=middle, SKIP=skip is not None, KEEP=kept is not None,
            BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_K=self.block_k,
            num_warps=4, num_stages=3,
        )  # fmt: skip


def first_input(x: Tensor, condition: Tensor, time: Tensor, margin: int, out: Tensor) -> None:
    """(x + condition) · time for [N, length], written into `out` [N, length + PADDING, 1]."""
    count, length = x.shape
    _first_input[(count, triton.cdiv(length, 1024))](x, condition, time, out, length, margin, PAD=PADDING)


@triton.jit
def _first_input(x, condition, time, out, length, margin, PAD: tl.constexpr):
    column = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    row = tl.program_id(0).to(tl.int64)
    inside = column < length
    values = tl.load(x + row * length + column, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(condition + row * length + column, mask=inside, other=0.0).to(tl.float32)
    values *= tl.load(time + column, mask=inside, other=0.0)
    target = out + row * (length + PAD) + margin + column
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _conv(
    x, matrix, bias, out, condition, time, skip, kept, blocks, groups, length, pitch, margin,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr,
    MIDDLE: tl.constexpr, SKIP: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = GROUP * OUTPUTS
    BLOCKS_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    token = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    first_row = (block // BLOCKS_N) * BLOCK_M
    first_column = (block % BLOCKS_N) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    # Rows behind the last group read the last group's inputs, and are not stored.
    readable = tl.minimum(row, groups - 1)
    a = x + token * pitch * INPUTS + readable[:, None] * (GROUP * INPUTS) + inner[None, :]
    b = matrix + inner[:, None] * COLUMNS + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(0, K // BLOCK_K):
        total = tl.dot(tl.load(a), tl.load(b), total)
        a += BLOCK_K
        b += BLOCK_K * COLUMNS
    total += tl.load(bias + column % OUTPUTS)[None, :]
    stored = (row < groups)[:, None] & (column < COLUMNS)[None, :]
    if MIDDLE:
        place = (token * pitch + margin) * OUTPUTS + row[:, None] * COLUMNS + column[None, :]
        total = tl.where(total > 0, total, tl.exp(total) - 1.0)
        if KEEP:
            tl.store(kept + place, total.to(kept.dtype.element_ty), mask=stored)
        if SKIP:
            total += tl.load(skip + place, mask=stored, other=0.0).to(tl.float32)
        position = readable[:, None] * GROUP + (column // OUTPUTS)[None, :]
        total += tl.load(condition + token * length + position).to(tl.float32)
        total *= tl.load(time + position)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=stored)
    else:
        place = token * length * OUTPUTS + row[:, None] * COLUMNS + column[None, :]
        tl.store(out + place, total.to(out.dtype.element_ty), mask=stored)
