"""Tokens of many networks to stacked weights, against the layout's own decoding, and their gradients."""

import pytest
import torch
from torch import Tensor

from rpg.collection.layout import Encoded, Layout
from rpg.collection.stacked_decoder import StackedDecoder
from rpg.collection.statistics import LayoutStatistics
from rpg.config import Normalisation, TokenCut

CPU = torch.device("cpu")


def checkpoint(seed: int) -> dict[str, Tensor]:
    """Weights of three dtypes, a variance, a tie, a scalar, and what is no token."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    weight = normal(4, 3, 2)
    return {
        "conv.weight": weight,
        "tied.weight": weight,
        "norm.running_var": normal(5).exp(),
        "norm.num_batches_tracked": torch.tensor(7),
        "half": normal(6).half(),
        "double": normal(3).double(),
        "scale": normal(),
        "constant": torch.ones(2),
    }


@pytest.fixture(scope="module", params=list(TokenCut))
def cut(request: pytest.FixtureRequest) -> TokenCut:
    value: TokenCut = request.param
    return value


@pytest.fixture(params=list(Normalisation))
def layout(request: pytest.FixtureRequest, cut: TokenCut) -> Layout:
    checkpoints = [checkpoint(seed) for seed in range(5)]
    statistics = LayoutStatistics(checkpoints[0])
    for each in checkpoints:
        statistics.update(each)
    return statistics.layout(7, request.param).with_token_size(7, cut)


def test_networks_are_those_that_the_layout_decodes(layout: Layout) -> None:
    tokens = torch.randn(3, layout.tokens, layout.token_size, generator=torch.Generator().manual_seed(1))
    stacked = StackedDecoder(layout, CPU)(tokens)
    assert list(stacked) == [spec.name for spec in layout.specs]
    for i in range(3):
        decoded = layout.decode(Encoded(tokens[i], layout.constants))
        for name, value in decoded.items():
            # The layout rounds to the tensor's own dtype.
            torch.testing.assert_close(stacked[name][i].to(value.dtype), value, rtol=1e-5, atol=1e-6)
    assert stacked["tied.weight"] is stacked["conv.weight"]
    assert stacked["norm.num_batches_tracked"].stride(0) == 0


def test_gradients_reach_every_value_and_no_padding(layout: Layout) -> None:
    tokens = torch.zeros(2, layout.tokens, layout.token_size, dtype=torch.float64, requires_grad=True)
    decoder = StackedDecoder(layout, CPU)
    names = [spec.name for spec in layout.specs if spec.tokens]

    def total(tokens: Tensor) -> Tensor:
        return torch.stack([decoder(tokens)[name].double().pow(2).sum() for name in names]).sum()

    (gradient,) = torch.autograd.grad(total(tokens), tokens)
    assert torch.equal(gradient[0] == 0, ~layout.mask())
    step = 1e-2
    for place in layout.mask().nonzero()[::5].tolist():
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                other = tokens.detach().clone()
                other[0, place[0], place[1]] += sign * step
                values.append(total(other))
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(gradient[0, place[0], place[1]], slope, rtol=5e-2, atol=5e-3)
