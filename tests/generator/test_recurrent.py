"""Properties of all recurrent networks: shapes, causality, pieces equal the whole."""

import pytest
import torch

from rpg.config import RecurrentConfig, RecurrentKind
from rpg.errors import RPGError
from rpg.generator.recurrent import build_recurrent
from rpg.generator.recurrent.ablations import Transformer

KINDS = list(RecurrentKind)
WITH_STATE = [kind for kind in KINDS if kind != RecurrentKind.none]


def build(kind: RecurrentKind, depth: int = 2) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_recurrent(
        RecurrentConfig(kind=kind, width=32, depth=depth, state_size=8, conv_width=4, expand=2, head_size=16)
    ).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 13])
def test_shape_and_dtype_are_kept(kind: RecurrentKind, length: int) -> None:
    x = torch.randn(3, length, 32, dtype=torch.float64)
    y, _ = build(kind)(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", [[13], [1] * 13, [5, 1, 7], [12, 1]])
def test_pieces_equal_the_whole(kind: RecurrentKind, pieces: list[int]) -> None:
    network = build(kind)
    x = torch.randn(3, 13, 32, dtype=torch.float64)
    state = None
    outputs = []
    for piece in torch.split(x, pieces, dim=1):
        y, state = network(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), network(x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_causal_and_independent_of_the_batch(kind: RecurrentKind) -> None:
    network = build(kind)
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[0][1, 4].sum(), x)
    influence = gradient.abs().sum(-1)
    assert torch.equal(influence[0], torch.zeros(9, dtype=torch.float64))
    assert torch.equal(influence[1, 5:], torch.zeros(4, dtype=torch.float64))
    assert influence[1, 4] > 0
    if kind != RecurrentKind.none:
        assert (influence[1, :4] > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_some_outputs_and_their_gradients_are_those_of_all(kind: RecurrentKind) -> None:
    network = build(kind)
    x = torch.randn(3, 9, 32, dtype=torch.float64, requires_grad=True)
    at = torch.tensor([[4, 0], [8, 7], [2, 6]])
    some, _ = network(x, at=at)
    every, _ = network(x)
    expected = torch.stack([every[row, indices] for row, indices in enumerate(at)])
    torch.testing.assert_close(some, expected)
    weights = torch.randn_like(some)
    (found,) = torch.autograd.grad((some * weights).sum(), x)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", WITH_STATE)
def test_state_is_optional(kind: RecurrentKind) -> None:
    network = build(kind)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    with_state, state = network(x)
    without, none = network(x, keep_state=False)
    assert state is not None
    assert none is None
    torch.testing.assert_close(with_state, without, rtol=0, atol=0)


@pytest.mark.parametrize("kind", WITH_STATE)
def test_depth_adds_parameters_and_all_are_trained(kind: RecurrentKind) -> None:
    def size(depth: int) -> int:
        return sum(p.numel() for p in build(kind, depth).parameters())

    assert size(3) - size(2) == size(2) - size(1) > 0
    network = build(kind, depth=3)
    network(torch.randn(2, 6, 32, dtype=torch.float64))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_none_returns_its_input() -> None:
    x = torch.randn(2, 3, 32)
    y, state = build_recurrent(RecurrentConfig(kind=RecurrentKind.none))(x)
    assert y is x
    assert state is None


def test_transformer_refuses_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(RPGError, match="head_size"):
        Transformer(32, depth=1, head_size=12)
