"""The kernel's noise against the plain generator's."""

import pytest
import torch

from rpg.sampling.noise import gaussian, seed_word


@pytest.mark.parametrize("size", [1, 50, 1500])
def test_same_noise(device, size):
    from rpg.sampling.gpu.kernels.gaussian import write_gaussian

    seeds = torch.tensor([seed_word(seed) for seed in (0, 7, 2**64 - 1, 2**63)])
    models, tokens = torch.tensor([0, 3, 10**6, 5]), torch.tensor([0, 12310, 7, 7])
    x = torch.full((4, size), torch.nan, device=device)
    rounded = torch.full_like(x, torch.nan)
    write_gaussian(seeds.to(device), models.to(device), tokens.to(device), 0.5, x, rounded)
    expected = 0.5 * gaussian(seeds, models, tokens, 0, size)
    torch.testing.assert_close(x.cpu(), expected, atol=2e-6, rtol=2e-5)
    assert torch.equal(rounded, x)
