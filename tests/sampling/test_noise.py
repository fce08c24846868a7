"""The noise: Philox against its published vectors, normality, and what it may depend on."""

import numpy as np
import pytest
import torch
from scipy import stats

from rpg.sampling.noise import gaussian, permutation_states, philox, seed_word

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The vectors of `kat_vectors` in Random123 (Salmon et al., SC 2011) for philox4x32-10."""
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def rows(models: list[int], tokens: list[int], seed: int = 7, draw: int = 0, size: int = 64) -> torch.Tensor:
    return gaussian(seed, torch.tensor(models), torch.tensor(tokens), draw, size)


def test_values_are_standard_normal() -> None:
    values = rows(list(range(100)), [3] * 100, size=1000).double().flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert abs(values.mean()) < 5 / np.sqrt(len(values))
    assert abs(values.var() - 1) < 5 * np.sqrt(2 / len(values))
    assert abs(stats.kurtosis(values)) < 5 * np.sqrt(24 / len(values))
    # Box-Muller makes values in pairs, Philox in fours: neighbours must not go together.
    for lag in (1, 2, 3, 4):
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 5 / np.sqrt(len(values))
        assert abs(np.corrcoef(values[:-lag] ** 2, values[lag:] ** 2)[0, 1]) < 5 / np.sqrt(len(values))


def test_any_other_seed_model_token_or_draw_gives_other_independent_noise() -> None:
    size = 20_000
    first = rows([1], [1], size=size)
    others = [
        rows([1], [1], seed=8, size=size),
        rows([1], [1], seed=7 + 2**32, size=size),
        rows([2], [1], size=size),
        rows([1], [2], size=size),
        rows([2], [0], size=size),
        rows([1], [1], draw=1, size=size),
    ]
    stacked = torch.cat([first, *others]).double().numpy()
    correlation = np.corrcoef(stacked) - np.eye(len(stacked))
    assert np.abs(correlation).max() < 5 / np.sqrt(size)


def test_a_row_is_the_same_in_any_batch() -> None:
    models = [i // 10 for i in range(100)]
    tokens = [i % 10 for i in range(100)]
    whole = rows(models, tokens, draw=4, size=50)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    shuffled = rows([models[i] for i in order], [tokens[i] for i in order], draw=4, size=50)
    assert torch.equal(shuffled, whole[order])
    for i in (0, 1, 57, 99):
        assert torch.equal(rows([models[i]], [tokens[i]], draw=4, size=50)[0], whole[i])


def test_a_shorter_token_has_the_same_beginning() -> None:
    assert torch.equal(rows([5], [6], size=7), rows([5], [6], size=64)[:, :7])


def test_values_do_not_change_between_versions() -> None:
    """Seeds are promises: what they gave yesterday they give tomorrow."""
    uniform = [(word >> 8) + 0.5 for word in (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)]
    u = np.array(uniform) * 2.0**-24
    expected = [
        np.sqrt(-2 * np.log(u[0])) * np.cos(2 * np.pi * u[1]),
        np.sqrt(-2 * np.log(u[0])) * np.sin(2 * np.pi * u[1]),
        np.sqrt(-2 * np.log(u[2])) * np.cos(2 * np.pi * u[3]),
        np.sqrt(-2 * np.log(u[2])) * np.sin(2 * np.pi * u[3]),
    ]
    np.testing.assert_allclose(rows([0], [0], seed=0, size=4)[0], expected, rtol=0, atol=2e-6)


def test_permutation_states_are_uniform_and_belong_to_the_model() -> None:
    states = permutation_states(3, range(5000), 10)
    assert stats.chisquare(np.bincount(states, minlength=10)).pvalue > 1e-3
    assert max(states) == 9
    assert [permutation_states(3, [model], 10)[0] for model in range(20)] == states[:20]
    assert permutation_states(4, range(20), 10) != states[:20]
    assert permutation_states(2**64 - 1, [0], 1) == [0]


def test_rows_of_several_seeds_get_each_the_noise_of_its_own() -> None:
    seeds = [0, 7, 2**63, 2**64 - 1]
    models, tokens = torch.tensor([3, 3, 0, 1]), torch.tensor([0, 5, 2, 2])
    together = gaussian(torch.tensor([seed_word(seed) for seed in seeds]), models, tokens, 2, 10)
    for i, seed in enumerate(seeds):
        assert torch.equal(together[i : i + 1], gaussian(seed, models[i : i + 1], tokens[i : i + 1], 2, 10))
