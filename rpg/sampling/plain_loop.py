"""The sampling loop in plain PyTorch: any device, the generator's own precision."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rpg.generator.generator import Generator
from rpg.sampling.noise import gaussian
from rpg.sampling.rows import Rows
from rpg.sampling.solvers import SolverStep


class PlainLoop:
    """Denoises batches; see `rpg.sampling.solvers` for the update."""

    def __init__(
        self,
        generator: Generator,
        steps: Sequence[SolverStep],
        guidance: float,
        temperature: float,
        clip: float = 0.0,
    ) -> None:
        self._generator = generator
        self._steps = steps
        self._guidance = guidance
        self._temperature = temperature
        self._clip = clip

    def __call__(self, rows: Rows) -> Tensor:
        """Sample the tokens of `rows`: normalised values, float32 [N, token_size]."""
        token_size = self._generator.layout.token_size
        seeds, models, tokens = (part.to(rows.prototypes.device) for part in rows[:3])
        return solve(
            self._generator,
            self._steps,
            rows.prototypes,
            rows.unconditional,
            lambda draw: gaussian(seeds, models, tokens, draw, token_size),
            self._guidance,
            self._temperature,
            self._clip,
        )


def solve(
    generator: Generator,
    steps: Sequence[SolverStep],
    prototypes: Tensor,
    unconditional: Tensor,
    noise: Callable[[int], Tensor],
    guidance: float,
    temperature: float,
    clip: float,
) -> Tensor:
    """Go through the steps of a solver; gradients flow back through all of them where they are recorded.

    Args:
        generator: whose denoiser is asked.
        steps: the solver's.
        prototypes: of the N tokens, [N, prototype_width].
        unconditional: those without condition; looked at only if there is guidance.
        noise: normal values [N, token_size], for draw 0 those that sampling starts from, for draw i + 1 the
            fresh noise of step i.
        guidance: scale of classifier-free guidance; 1 is off.
        temperature: standard deviation of the noise that sampling starts from.
        clip: largest magnitude of an estimate; 0: any.

    Returns:
        Normalised values of the tokens, float32 [N, token_size].
    """
    denoiser = generator.denoiser
    prepared = denoiser.prepare(prototypes)
    if guidance != 1:
        null = denoiser.prepare(unconditional)
    x = noise(0) * temperature
    previous = torch.zeros_like(x)
    for i, step in enumerate(steps):
        t = torch.tensor([step.t], device=x.device)
        prediction = denoiser.denoise(x, t, prepared)
        if guidance != 1:
            without = denoiser.denoise(x, t, null)
            prediction = without + guidance * (prediction - without)
        estimate = generator.diffusion.to_x0(prediction, x, step.t)
        if clip:
            estimate = estimate.clamp(-clip, clip)
        x = step.current * x + step.estimate * estimate
        if step.previous_estimate:
            x = x + step.previous_estimate * previous
        if step.noise:
            x = x + step.noise * noise(i + 1)
        previous = estimate
    return x
