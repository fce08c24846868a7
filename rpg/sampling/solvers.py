"""Solvers of the reverse process, as tables of coefficients.

Every solver here is linear in what it knows at a step: with the current values x, the denoised estimate x̂,
the estimate x̂' of the step before and fresh noise z,

    x_next = a · x + b · x̂ + c · x̂' + s · z,

so a solver is a table of (t, a, b, c, s), computed once in float64; the sampling loop is the same for all.

Sources: DDPM, Ho et al., arXiv 2006.11239 eq. 7; DDIM, Song et al., arXiv 2010.02502 eq. 12 and 16 (η = 1
on all timesteps is DDPM), also at the timesteps of the published code of arXiv 2501.11587; DPM-Solver++(2M),
Lu et al., arXiv 2211.01095 algorithm 2.
"""

import math
from typing import NamedTuple

from torch import Tensor

from rpg.config import SamplingConfig, Solver
from rpg.generator.denoiser.direct import DirectPrediction
from rpg.generator.generator import Generator


class SolverStep(NamedTuple):
    """One row: the timestep at which to ask the denoiser, and the coefficients of the update."""

    t: int
    current: float
    estimate: float
    previous_estimate: float
    noise: float


def generator_steps(generator: Generator, sampling: SamplingConfig) -> list[SolverStep]:
    """The steps through which a generator makes networks with these settings."""
    if isinstance(generator.denoiser, DirectPrediction):
        # Without diffusion the only estimate is the result.
        return [SolverStep(0, current=0.0, estimate=1.0, previous_estimate=0.0, noise=0.0)]
    return solver_steps(generator.diffusion.alpha_bar, sampling)


def solver_steps(alpha_bar: Tensor, sampling: SamplingConfig) -> list[SolverStep]:
    """The table of `sampling.solver` on the schedule `alpha_bar` (float64 [timesteps]).

    Timesteps are spaced evenly. They begin with the noisiest ("trailing"), and the last row lands on clean
    values; `ddim_leading` begins earlier and lands on values with the noise of timestep 0.
    """
    if sampling.solver == Solver.ddim_leading:
        timesteps = leading_timesteps(len(alpha_bar), sampling.steps)
        powers = [float(alpha_bar[t]) for t in (*timesteps, 0)]
        return _ddim(timesteps, powers, sampling.eta)
    timesteps = spaced_timesteps(len(alpha_bar), sampling.steps)
    powers = [float(alpha_bar[t]) for t in timesteps] + [1.0]
    if sampling.solver == Solver.dpmpp_2m:
        return _dpmpp_2m(timesteps, powers)
    eta = 1.0 if sampling.solver == Solver.ddpm else sampling.eta
    return _ddim(timesteps, powers, eta)


def spaced_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps from `timesteps - 1` down, evenly spaced."""
    return [round(timesteps * (steps - i) / steps) - 1 for i in range(steps)]


def leading_timesteps(timesteps: int, steps: int) -> list[int]:
    """`steps` < `timesteps` of them, ⌊timesteps / steps⌋ apart, down to 1: the published code's."""
    return [1 + i * (timesteps // steps) for i in reversed(range(steps))]


def _ddim(timesteps: list[int], powers: list[float], eta: float) -> list[SolverStep]:
    steps = []
    for i, t in enumerate(timesteps):
        now, after = powers[i], powers[i + 1]
        variance = eta**2 * (1 - after) / (1 - now) * (1 - now / after)
        current = math.sqrt(max(1 - after - variance, 0.0) / (1 - now))
        estimate = math.sqrt(after) - current * math.sqrt(now)
        steps.append(SolverStep(t, current, estimate, 0.0, math.sqrt(variance)))
    return steps


def _dpmpp_2m(timesteps: list[int], powers: list[float]) -> list[SolverStep]:
    steps = []
    # λ is half the log signal-to-noise ratio; the width h of the previous step extrapolates the estimate.
    previous_width: float | None = None
    for i, t in enumerate(timesteps):
        now, after = powers[i], powers[i + 1]
        if i == len(timesteps) - 1:
            # Onto clean values h is infinite: first order, as the authors advise for few steps.
            steps.append(SolverStep(t, 0.0, 1.0, 0.0, 0.0))
            break
        width = _half_log_snr(after) - _half_log_snr(now)
        scale = -math.sqrt(after) * math.expm1(-width)
        extrapolation = width / (2 * previous_width) if previous_width is not None else 0.0
        current = math.sqrt((1 - after) / (1 - now))
        steps.append(SolverStep(t, current, scale * (1 + extrapolation), -scale * extrapolation, 0.0))
        previous_width = width
    return steps


def _half_log_snr(alpha_bar: float) -> float:
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))
