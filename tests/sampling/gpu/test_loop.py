"""The GPU's sampling loop, every kernel in it, against the plain one: both denoisers, every solver."""

import pytest
import torch

from rpg.collection.statistics import LayoutStatistics
from rpg.config import (
    ConditionConfig,
    DenoiserConfig,
    DenoiserKind,
    DiffusionConfig,
    GeneratorConfig,
    Normalisation,
    Prediction,
    RecurrentConfig,
    SamplingConfig,
    Solver,
)
from rpg.generator.generator import Generator
from rpg.sampling.plain_loop import PlainLoop
from rpg.sampling.rows import Rows
from rpg.sampling.solvers import solver_steps


def generator_of(denoiser, prediction):
    random = torch.Generator().manual_seed(0)
    statistics = LayoutStatistics({"weight": torch.zeros(300)})
    for _ in range(2):
        statistics.update({"weight": torch.randn(300, generator=random)})
    layout = statistics.layout(128, Normalisation.residual)
    config = GeneratorConfig(
        recurrent=RecurrentConfig(width=16, head_size=8, state_size=8),
        denoiser=denoiser,
        condition=ConditionConfig(size=4, width=8, dropout=0.5),
        diffusion=DiffusionConfig(prediction=prediction),
    )
    torch.manual_seed(0)
    generator = Generator(config, layout).eval()
    for parameter in generator.denoiser.parameters():
        # Output layers start at zero.
        torch.nn.init.normal_(parameter, std=0.1)
    for name, buffer in generator.denoiser.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    return generator


def rows_of(count):
    random = torch.Generator().manual_seed(1)
    return Rows(
        torch.arange(count), torch.arange(count) // 3, torch.arange(count) % 3,
        torch.randn(count, 16, generator=random), torch.randn(count, 16, generator=random),
    )  # fmt: skip


MLP = DenoiserConfig(width=32, depth=2)
UNET = DenoiserConfig(kind=DenoiserKind.unet, channels=[1, 16, 32, 64, 32, 16, 1])


@pytest.mark.parametrize("denoiser", [MLP, UNET], ids=["mlp", "unet"])
@pytest.mark.parametrize(
    ("solver", "prediction", "guidance", "clip"),
    [
        (Solver.dpmpp_2m, Prediction.x0, 1.0, 0.0),
        (Solver.dpmpp_2m, Prediction.x0, 1.0, 0.3),
        (Solver.ddim, Prediction.v, 2.0, 0.0),
        (Solver.ddpm, Prediction.noise, 1.0, 0.0),
        (Solver.ddim, Prediction.noise, 1.0, 0.5),
        (Solver.dpmpp_2m, Prediction.v, 2.0, 0.5),
    ],
)
def test_same_tokens_as_the_plain_loop(device, denoiser, solver, prediction, guidance, clip):
    from rpg.sampling.gpu.loop import GPULoop

    generator = generator_of(denoiser, prediction)
    sampling = SamplingConfig(solver=solver, steps=3, guidance=guidance, temperature=0.8)
    steps = solver_steps(generator.diffusion.alpha_bar, sampling)
    rows = rows_of(6)
    with torch.inference_mode():
        expected = PlainLoop(generator, steps, guidance, 0.8, clip)(rows)
        generator.to(device)
        graph = device.type == "cuda"
        loop = GPULoop(generator, steps, guidance, 0.8, 6, clip, dtype=torch.float32, graph=graph)
        found = loop(rows)
    if clip:
        assert expected.abs().max() == pytest.approx(clip), "the last step's estimate is the result"
    scale = expected.square().mean().sqrt()
    tolerance = 1e-4 if device.type == "cpu" else 2e-2
    assert (found.cpu() - expected).square().mean().sqrt() < tolerance * scale


def test_clipping_leaves_what_is_not_a_number(device):
    """A network of it is refused; Triton's interpreter leaves it in any case, a GPU's minimum does not."""
    from rpg.sampling.gpu.kernels.solver_update import Update, apply_update

    update = Update(0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1, remembered=False, clip=2.0)
    prediction = torch.tensor([[1.0, -5.0, 7.0, torch.nan, torch.inf, -torch.inf]], device=device)
    x, estimate, rounded = torch.zeros(3, 1, 6, device=device)
    whose = torch.zeros(1, dtype=torch.int64, device=device)
    apply_update(update, 1.0, whose, whose, whose, prediction, None, x, estimate, rounded, keeps=False)
    expected = torch.tensor([[1.0, -2.0, 2.0, torch.nan, 2.0, -2.0]])
    torch.testing.assert_close(x.cpu(), expected, rtol=0, atol=0, equal_nan=True)
