"""Position embeddings against the formula, written as a loop."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpg.collection.layout import Layout
from rpg.config import Positions
from rpg.errors import RPGError
from rpg.generator.embeddings import embedded_positions, position_embedding


@settings(deadline=None, max_examples=30)
@given(
    positions=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 500_000)), min_size=1, max_size=5),
    quarter=st.integers(1, 16),
)
def test_equals_the_formula(positions: list[tuple[int, int]], quarter: int) -> None:
    width, half = 4 * quarter, 2 * quarter
    actual = position_embedding(torch.tensor(positions), width)
    assert actual.dtype == torch.float32
    assert actual.shape == (len(positions), width)
    for row, (tensor, token) in enumerate(positions):
        for offset, index in ((0, token), (half, tensor)):
            for pair in range(0, half, 2):
                angle = index * math.exp(-pair * math.log(10000) / half)
                assert actual[row, offset + pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
                assert actual[row, offset + pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_one_dimensional_embeddings_count_tokens_through_all_tensors(
    make_layout: Callable[..., Layout],
) -> None:
    layout = make_layout(16)
    actual = embedded_positions(Positions.sinusoid_1d, layout, 12)
    assert actual.shape == (layout.tokens, 12)
    for index in range(layout.tokens):
        for pair in range(0, 12, 2):
            angle = index * 10000 ** (-pair / 12)
            assert actual[index, pair].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert actual[index, pair + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_distinct_positions_are_distinct() -> None:
    grid = torch.cartesian_prod(torch.arange(60), torch.arange(60))
    embedded = position_embedding(grid, 64)
    distance = torch.cdist(embedded, embedded) + 10 * torch.eye(len(grid))
    assert distance.min() > 0.1


@pytest.mark.parametrize("width", [0, -4, 2, 30])
def test_widths_that_do_not_split_are_refused(width: int) -> None:
    with pytest.raises(RPGError, match="multiple of 4"):
        position_embedding(torch.zeros(1, 2, dtype=torch.int64), width)
