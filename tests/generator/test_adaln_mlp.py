"""The AdaLN MLP against a second implementation over bare parameters, and its groups of tokens."""

import math

import torch
from torch import Tensor

from rpg.generator.denoiser.adaln_mlp import AdaLNMLP

TOKEN, WIDTH, DEPTH, PROTOTYPE = 11, 8, 2, 5


def build(random: bool = True) -> AdaLNMLP:
    torch.manual_seed(0)
    mlp = AdaLNMLP(TOKEN, WIDTH, DEPTH, PROTOTYPE).double()
    if random:
        for parameter in mlp.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return mlp


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def direct(mlp: AdaLNMLP, x: Tensor, t: int, prototype: Tensor) -> Tensor:
    """One token, from the equations: six numbers of modulation a block and width, as in DiT."""
    p = dict(mlp.named_parameters())
    angles = [t * 10000 ** (-k / 128) for k in range(128)]
    features = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]).double()
    time = silu(p["timestep.mlp.0.weight"] @ features + p["timestep.mlp.0.bias"])
    time = p["timestep.mlp.2.weight"] @ time + p["timestep.mlp.2.bias"]
    modulation = p["prototype_modulation.weight"] @ silu(prototype) + p["prototype_modulation.bias"]
    modulation = modulation + p["timestep_modulation.weight"] @ silu(time)

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean()
        return centred / torch.sqrt((centred**2).mean() + 1e-5) * (1 + scale) + shift

    parts = [modulation[i * WIDTH : (i + 1) * WIDTH] for i in range(3 * DEPTH + 2)]
    x = p["input.weight"] @ x + p["input.bias"]
    for i in range(DEPTH):
        hidden = modulated(x, parts[3 * i], parts[3 * i + 1])
        hidden = silu(p[f"blocks.{i}.0.weight"] @ hidden + p[f"blocks.{i}.0.bias"])
        x = x + parts[3 * i + 2] * (p[f"blocks.{i}.2.weight"] @ hidden + p[f"blocks.{i}.2.bias"])
    return p["output.weight"] @ modulated(x, parts[-2], parts[-1]) + p["output.bias"]


def inputs(rows: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    x = torch.randn(rows, TOKEN, generator=random, dtype=torch.float64)
    return x, torch.randn(rows, PROTOTYPE, generator=random, dtype=torch.float64)


def test_equals_the_equations_with_one_timestep_a_group() -> None:
    mlp = build()
    x, prototype = inputs(6)
    t = torch.tensor([3, 40, 0])
    expected = torch.stack([direct(mlp, x[i], int(t[i // 2]), prototype[i]) for i in range(6)])
    # The timestep's frequencies are kept in float32.
    torch.testing.assert_close(mlp(x, t, prototype), expected, rtol=0, atol=1e-5)


def test_groups_equal_rows_and_preparing_equals_forward() -> None:
    mlp = build()
    x, prototype = inputs(6)
    t = torch.tensor([7, 500])
    grouped = mlp(x, t, prototype)
    torch.testing.assert_close(mlp(x, t.repeat_interleave(3), prototype), grouped)
    prepared = mlp.prepare(prototype)
    assert torch.equal(mlp.denoise(x, t, prepared), grouped)
    assert prepared.shape == (6, (3 * DEPTH + 2) * WIDTH)


def test_a_fresh_network_predicts_zero_and_its_output_layer_learns() -> None:
    mlp = build(random=False)
    x, prototype = inputs(4)
    answer = mlp(x, torch.tensor([10]), prototype)
    assert torch.equal(answer, torch.zeros(4, TOKEN, dtype=torch.float64))
    torch.autograd.backward(((answer - 1) ** 2).sum())
    assert mlp.output.weight.grad is not None
    assert mlp.output.weight.grad.abs().max() > 0
