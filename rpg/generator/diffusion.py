"""The forward process: noise schedules, and what the denoiser is asked to predict.

Source: Ho et al., arXiv 2006.11239 (noise prediction, linear schedule); Nichol & Dhariwal, arXiv 2102.09672
(cosine schedule); Salimans & Ho, arXiv 2202.00512 (v-prediction).
"""

import math

import torch
from torch import Tensor, nn

from rpg.config import DiffusionConfig, Prediction, Schedule


class Diffusion(nn.Module):
    """x_t = signal_t · x_0 + noise_t · ε with signal_t² + noise_t² = 1, for integer t in [0, timesteps).

    It has no parameters; the rates are buffers that are not saved, since the configuration determines them.
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.prediction = config.prediction
        self.timesteps = config.timesteps
        self.alpha_bar = signal_power(config)
        self.register_buffer("signal", self.alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1 - self.alpha_bar).sqrt().float(), persistent=False)

    def diffuse(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Noised values x_t of `x0` [..., size] at the timesteps `t` [...], with `noise` like `x0`."""
        return self.signal[t][..., None] * x0 + self.noise[t][..., None] * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the denoiser should predict at (x_t, t): the noise, v = signal·ε - noise·x_0, or x_0."""
        if self.prediction == Prediction.noise:
            return noise
        if self.prediction == Prediction.x0:
            return x0
        return self.signal[t][..., None] * noise - self.noise[t][..., None] * x0

    def to_x0(self, prediction: Tensor, xt: Tensor, t: int) -> Tensor:
        """The x_0 that a denoiser's prediction at (`xt`, `t`) implies; all shapes are equal."""
        if self.prediction == Prediction.x0:
            return prediction
        signal, noise = self.signal[t], self.noise[t]
        if self.prediction == Prediction.noise:
            return (xt - noise * prediction) / signal
        return signal * xt - noise * prediction


def signal_power(config: DiffusionConfig) -> Tensor:
    """The schedule's cumulative product ᾱ, float64 [timesteps], decreasing."""
    steps = config.timesteps
    if config.schedule == Schedule.linear:
        betas = torch.linspace(config.beta_start, config.beta_end, steps, dtype=torch.float64)
    else:
        offset = 0.008
        time = torch.arange(steps + 1, dtype=torch.float64) / steps
        curve = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
        betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)
