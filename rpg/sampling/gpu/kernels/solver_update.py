"""One solver step over a denoising batch, in one pass: see `rpg.sampling.solvers` for the equation."""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from rpg.config import Prediction
from rpg.generator.diffusion import Diffusion
from rpg.sampling.gpu.kernels.gaussian import normal_values
from rpg.sampling.solvers import SolverStep

_BLOCKS = 256


class Update(NamedTuple):
    """The numbers of one step: next = current · x + estimate · x̂ + previous · x̂' + noise · z, and
    x̂ = from_x · x + from_prediction · prediction."""

    from_x: float
    from_prediction: float
    current: float
    estimate: float
    previous: float
    noise: float
    draw: int
    remembered: bool
    """Whether the next step needs this one's x̂."""
    clip: float
    """Largest magnitude of x̂; 0 is any."""

    @staticmethod
    def of(steps: Sequence[SolverStep], index: int, diffusion: Diffusion, clip: float = 0.0) -> "Update":
        """Of row `index` of a solver's table."""
        step = steps[index]
        signal, noise = float(diffusion.signal[step.t]), float(diffusion.noise[step.t])
        from_x, from_prediction = {
            Prediction.x0: (0.0, 1.0),
            Prediction.noise: (1 / signal, -noise / signal),
            Prediction.v: (signal, -noise),
        }[diffusion.prediction]
        remembered = index + 1 < len(steps) and steps[index + 1].previous_estimate != 0
        return Update(
            from_x, from_prediction, step.current, step.estimate, step.previous_estimate, step.noise,
            index + 1, remembered, clip,
        )  # fmt: skip


def apply_update(
    update: Update,
    guidance: float,
    seeds: Tensor,
    models: Tensor,
    tokens: Tensor,
    prediction: Tensor,
    unconditional: Tensor | None,
    x: Tensor,
    estimate: Tensor,
    rounded: Tensor,
    keeps: bool = True,
) -> None:
    """Take a step in place.

    Args:
        update: the step's numbers.
        guidance: scale of classifier-free guidance; counts with `unconditional`.
        seeds, models, tokens: int64 [N], whose noise the rows take.
        prediction: what the denoiser answered, [N, size].
        unconditional: what it answered without condition, or None.
        x: float32 [N, size], becomes the next values.
        estimate: [N, size], the step before's x̂ becomes this step's.
        rounded: [N, size], becomes the next values in the denoiser's precision.
        keeps: whether `estimate` is to be written at all.
    """
    count, size = x.shape
    grid = (count, triton.cdiv(size, 4 * _BLOCKS))
    _update[grid](
        seeds, models, tokens, prediction,
        prediction if unconditional is None else unconditional,
        x, estimate, rounded, guidance, size, *update[:6], update.clip, update.draw,
        GUIDED=unconditional is not None, REMEMBERS=update.previous != 0, NOISE=update.noise != 0,
        CLIPS=update.clip != 0, KEEPS=keeps and update.remembered, BLOCKS=_BLOCKS,
    )  # fmt: skip


@triton.jit
def _update(
    seeds, models, tokens, prediction, unconditional, x, estimate, rounded, guidance, size,
    from_x, from_prediction, current_rate, estimate_rate, previous_rate, noise_rate, clip, draw,
    GUIDED: tl.constexpr, REMEMBERS: tl.constexpr, NOISE: tl.constexpr, CLIPS: tl.constexpr,
    KEEPS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first_block = tl.program_id(1) * BLOCKS
    column = 4 * first_block + tl.arange(0, 4 * BLOCKS)
    inside = column < size
    place = row * size + column
    now = tl.load(x + place, mask=inside, other=0.0)
    answer = tl.load(prediction + place, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        without = tl.load(unconditional + place, mask=inside, other=0.0).to(tl.float32)
        answer = without + guidance * (answer - without)
    clean = from_x * now + from_prediction * answer
    if CLIPS:
        # Unlike a minimum and a maximum, these leave NaN as it is, to be refused.
        clean = tl.where(clean > clip, clip, clean)
        clean = tl.where(clean < -clip, -clip, clean)
    after = current_rate * now + estimate_rate * clean
    if REMEMBERS:
        before = tl.load(estimate + place, mask=inside, other=0.0)
        after += previous_rate * before.to(tl.float32)
    if NOISE:
        seed, model, token = tl.load(seeds + row), tl.load(models + row), tl.load(tokens + row)
        after += noise_rate * normal_values(seed, model, token, draw, first_block, BLOCKS)
    if KEEPS:
        tl.store(estimate + place, clean, mask=inside)
    tl.store(x + place, after, mask=inside)
    tl.store(rounded + place, after.to(rounded.dtype.element_ty), mask=inside)
