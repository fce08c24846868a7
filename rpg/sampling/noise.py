"""Gaussian noise that belongs to its model: a pure function of (seed, model, token, draw, element).

The counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011) needs no state, so the noise of a model does not depend on what it is batched with, on the device, or on
what was generated before (invariant 2 of docs/architecture.md). Box-Muller turns its words into normal
values.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_STATE_DRAW = 0xFFFFFFFF

Word = TypeVar("Word", int, Tensor)


def gaussian(seed: int | Tensor, models: Tensor, tokens: Tensor, draw: int, size: int) -> Tensor:
    """Standard normal values, float32 [N, size].

    Args:
        seed: the job's seed, 0 <= seed < 2**64; or, for rows of several jobs, int64 [N] (see `seed_word`).
        models: int64 [N], the index in its job of the model that each row belongs to.
        tokens: int64 [N], the index in its model of the token that each row is for.
        draw: which draw of the token: 0 starts the sampling, i + 1 is the fresh noise of its step i.
        size: values a row.
    """
    blocks = torch.arange(math.ceil(size / 4), device=models.device)
    counter = (blocks[None, :], tokens[:, None], models[:, None], torch.full_like(blocks, draw)[None, :])
    shape = (len(models), len(blocks))
    keys = seed[:, None] if isinstance(seed, Tensor) else seed
    words = philox(tuple(part.expand(shape) for part in counter), (keys & _WORD, (keys >> 32) & _WORD))
    # 24 bits fill a float32's mantissa; half a step keeps the logarithm finite.
    uniform = [((word >> 8).float() + 0.5) * 2.0**-24 for word in words]
    normal = []
    for first, second in ((uniform[0], uniform[1]), (uniform[2], uniform[3])):
        radius, angle = torch.sqrt(-2 * torch.log(first)), 2 * math.pi * second
        normal += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normal, dim=-1).flatten(1)[:, :size]


def seed_word(seed: int) -> int:
    """The bits of `seed` (0 <= seed < 2**64) as a signed integer, as an int64 tensor of seeds holds them."""
    return seed - 2**64 if seed >= 2**63 else seed


def permutation_states(seed: int, models: Sequence[int], states: int) -> list[int]:
    """The permutation states that models of a job are given, by their indices; uniform over `states`."""
    key = (seed & _WORD, seed >> 32)
    words = (philox((0, 0, model, _STATE_DRAW), key) for model in models)
    return [(first << 32 | second) % states for first, second, *_ in words]


def philox(
    counter: tuple[Word, ...], key: tuple[int | Tensor, int | Tensor]
) -> tuple[Word, Word, Word, Word]:
    """Philox4x32-10: four 32-bit words for each counter of four such words.

    Words are tensors of int64, or plain integers, which are faster for a few. The two words of `key` are the
    same for all counters, or tensors that broadcast with them.
    """
    a, b, c, d = cast(tuple[Any, ...], counter)
    key0, key1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2**64, which keeps the low word; the shift's sign bits are masked off.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a, b, c, d = (
            ((second >> 32) & _WORD) ^ b ^ key0,
            second & _WORD,
            ((first >> 32) & _WORD) ^ d ^ key1,
            first & _WORD,
        )
        key0, key1 = (key0 + _KEY_STEPS[0]) & _WORD, (key1 + _KEY_STEPS[1]) & _WORD
    return a, b, c, d
