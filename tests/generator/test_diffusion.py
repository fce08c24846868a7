"""Noise schedules against their formulas, and clean values from predictions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpg.config import DiffusionConfig, Prediction, Schedule
from rpg.generator.diffusion import Diffusion, signal_power


def test_linear_schedule_is_the_product_of_linear_betas() -> None:
    powers = signal_power(DiffusionConfig(timesteps=1000, beta_start=1e-4, beta_end=0.02))
    assert powers.dtype == torch.float64
    product = 1.0
    for t in range(1000):
        product *= 1 - (1e-4 + t * (0.02 - 1e-4) / 999)
        assert powers[t].item() == pytest.approx(product, rel=1e-10)
    # The published model's last step keeps 4e-5 of the signal's power.
    assert powers[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


@pytest.mark.parametrize("timesteps", [10, 1000])
def test_cosine_schedule_is_that_of_improved_ddpm(timesteps: int) -> None:
    """Nichol & Dhariwal, arXiv 2102.09672 eq. 17: ᾱ = f(t) / f(0), betas clipped at 0.999."""

    def f(t: int) -> float:
        return math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2

    powers = signal_power(DiffusionConfig(schedule=Schedule.cosine, timesteps=timesteps))
    for t in range(timesteps - 1):
        assert powers[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    # The last beta would be 1; clipped, a thousandth of the power is left.
    assert (powers[-1] / powers[-2]).item() == pytest.approx(0.001, rel=1e-9)


@settings(deadline=None, max_examples=25)
@given(schedule=st.sampled_from(list(Schedule)), timesteps=st.integers(2, 1500))
def test_signal_decreases_and_powers_sum_to_one(schedule: Schedule, timesteps: int) -> None:
    diffusion = Diffusion(DiffusionConfig(schedule=schedule, timesteps=timesteps))
    assert len(diffusion.alpha_bar) == timesteps
    assert (diffusion.alpha_bar.diff() < 0).all()
    assert diffusion.alpha_bar[-1] > 0
    assert diffusion.alpha_bar[0] < 1
    power = diffusion.signal.double() ** 2 + diffusion.noise.double() ** 2
    torch.testing.assert_close(power, torch.ones(timesteps, dtype=torch.float64), rtol=0, atol=3e-7)
    assert not diffusion.state_dict()


@settings(deadline=None, max_examples=80)
@given(
    prediction=st.sampled_from(list(Prediction)),
    schedule=st.sampled_from(list(Schedule)),
    t=st.integers(0, 999),
    seed=st.integers(0, 2**31),
)
def test_the_target_gives_back_clean_values(
    prediction: Prediction, schedule: Schedule, t: int, seed: int
) -> None:
    diffusion = Diffusion(DiffusionConfig(schedule=schedule, prediction=prediction))
    random = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(3, 5, generator=random), torch.randn(3, 5, generator=random)
    each = torch.full((3,), t)
    xt = diffusion.diffuse(x0, noise, each)
    power = diffusion.alpha_bar[t].item()
    torch.testing.assert_close(xt, math.sqrt(power) * x0 + math.sqrt(1 - power) * noise, rtol=0, atol=2e-6)
    back = diffusion.to_x0(diffusion.target(x0, noise, each), xt, t)
    # Clean values out of predicted noise are a quotient by the signal: its rounding grows with the noise.
    tolerance = 2e-6 / math.sqrt(power) if prediction == Prediction.noise else 3e-6
    torch.testing.assert_close(back, x0, rtol=0, atol=tolerance)


def test_each_row_has_its_own_timestep() -> None:
    diffusion = Diffusion(DiffusionConfig())
    x0, noise, t = torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.tensor([[0, 400, 999], [5, 5, 7]])
    xt, target = diffusion.diffuse(x0, noise, t), diffusion.target(x0, noise, t)
    for i in range(2):
        for j in range(3):
            one = t[i, j][None]
            assert torch.equal(xt[i, j][None], diffusion.diffuse(x0[i, j][None], noise[i, j][None], one))
            assert torch.equal(target[i, j][None], diffusion.target(x0[i, j][None], noise[i, j][None], one))


def test_v_is_the_derivative_of_the_path() -> None:
    """Salimans & Ho, arXiv 2202.00512 appendix D: with signal = cos φ and noise = sin φ, v = dx_t / dφ."""
    diffusion = Diffusion(DiffusionConfig(prediction=Prediction.v))
    x0, noise = torch.randn(1, 6), torch.randn(1, 6)
    for t in (0, 300, 999):
        angle = math.acos(math.sqrt(diffusion.alpha_bar[t].item()))
        small = 1e-4

        def at(angle: float) -> torch.Tensor:
            return math.cos(angle) * x0.double() + math.sin(angle) * noise.double()

        slope = (at(angle + small) - at(angle - small)) / (2 * small)
        target = diffusion.target(x0, noise, torch.tensor([t])).double()
        torch.testing.assert_close(target, slope, rtol=0, atol=1e-5)
