"""The sampling loop in plain PyTorch: any device, the generator's own precision."""

from collections.abc import Sequence

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
        denoiser, guidance = self._generator.denoiser, self._guidance
        token_size = self._generator.layout.token_size
        seeds, models, tokens = (part.to(rows.prototypes.device) for part in rows[:3])
        prepared = denoiser.prepare(rows.prototypes)
        if guidance != 1:
            null = denoiser.prepare(rows.unconditional)
        x = gaussian(seeds, models, tokens, 0, token_size) * self._temperature
        previous = torch.zeros_like(x)
        for i, step in enumerate(self._steps):
            t = torch.tensor([step.t], device=x.device)
            prediction = denoiser.denoise(x, t, prepared)
            if guidance != 1:
                unconditional = denoiser.denoise(x, t, null)
                prediction = unconditional + guidance * (prediction - unconditional)
            estimate = self._generator.diffusion.to_x0(prediction, x, step.t)
            if self._clip:
                estimate = estimate.clamp(-self._clip, self._clip)
            x = step.current * x + step.estimate * estimate
            if step.previous_estimate:
                x = x + step.previous_estimate * previous
            if step.noise:
                x = x + step.noise * gaussian(seeds, models, tokens, i + 1, token_size)
            previous = estimate
        return x
