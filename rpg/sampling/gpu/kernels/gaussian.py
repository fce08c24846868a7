"""The counter-based noise of `rpg.sampling.noise`, in one pass: what each token starts from."""

import triton
import triton.language as tl
from torch import Tensor

# Philox blocks of four values that one program draws.
_BLOCKS = 256


def write_gaussian(
    seeds: Tensor, models: Tensor, tokens: Tensor, scale: float, x: Tensor, rounded: Tensor
) -> None:
    """Write draw 0 of every row, times `scale`, to `x` (float32 [N, size]) and, rounded, to `rounded`.

    `seeds`, `models` and `tokens` are int64 [N], as `rpg.sampling.noise.gaussian` takes them; words of the
    generator are the same, logarithm and cosine are the GPU's.
    """
    count, size = x.shape
    grid = (count, triton.cdiv(size, 4 * _BLOCKS))
    _gaussian[grid](seeds, models, tokens, x, rounded, scale, size, BLOCKS=_BLOCKS)


@triton.jit
def normal_values(seed, model, token, draw, first_block, BLOCKS: tl.constexpr):
    """Values 4 · first_block … 4 · (first_block + BLOCKS) - 1 of a row's noise, float32 [4 · BLOCKS]."""
    block = (first_block + tl.arange(0, BLOCKS)).to(tl.uint32)
    zero = block * 0
    a, b, c, d = tl.philox(
        seed, block, zero + token.to(tl.uint32), zero + model.to(tl.uint32), (zero + draw).to(tl.uint32)
    )
    first_radius, first_angle = _polar(a, b)
    second_radius, second_angle = _polar(c, d)
    even = tl.interleave(first_radius * tl.cos(first_angle), second_radius * tl.cos(second_angle))
    odd = tl.interleave(first_radius * tl.sin(first_angle), second_radius * tl.sin(second_angle))
    return tl.interleave(even, odd)


@triton.jit
def _polar(first, second):
    radius = tl.sqrt(-2.0 * tl.log(_uniform(first)))
    return radius, 6.283185307179586 * _uniform(second)


@triton.jit
def _uniform(word):
    return ((word >> 8).to(tl.int32).to(tl.float32) + 0.5) * 5.9604644775390625e-08


@triton.jit
def _gaussian(seeds, models, tokens, x, rounded, scale, size, BLOCKS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first_block = tl.program_id(1) * BLOCKS
    seed, model, token = tl.load(seeds + row), tl.load(models + row), tl.load(tokens + row)
    values = scale * normal_values(seed, model, token, tl.full((), 0, tl.int32), first_block, BLOCKS)
    column = 4 * first_block + tl.arange(0, 4 * BLOCKS)
    tl.store(x + row * size + column, values, mask=column < size)
    tl.store(rounded + row * size + column, values.to(rounded.dtype.element_ty), mask=column < size)
