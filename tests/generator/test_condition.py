"""Conditions: standardisation, dropping, sizes."""

import pytest
import torch

from rpg.config import ConditionConfig, ConditionForm, ConditionKind
from rpg.errors import RPGError
from rpg.generator.condition import (
    ConvolutionalCondition,
    GatedCondition,
    NoCondition,
    PermutationState,
    VectorCondition,
    build_condition,
)

WIDTH = 6
TOKENS = 11


def vector(size: int = 4) -> VectorCondition:
    torch.manual_seed(0)
    condition = build_condition(ConditionConfig(kind=ConditionKind.vector, size=size, width=5), WIDTH, TOKENS)
    assert isinstance(condition, VectorCondition)
    return condition


def test_vectors_are_standardised_by_the_training_conditions() -> None:
    condition = vector()
    # The second value never changes: it is centred and left at its scale.
    training = torch.tensor([[1.0, 7, -2, 100], [3, 7, 4, 300], [5, 7, 1, 200]])
    condition.fit(training)
    deviation = ((training - training.mean(0)) ** 2).mean(0).sqrt()
    deviation[1] = 1
    p = dict(condition.mlp.named_parameters())
    hidden = (training - training.mean(0)) / deviation @ p["0.weight"].T + p["0.bias"]
    expected = hidden * torch.sigmoid(hidden) @ p["2.weight"].T + p["2.bias"]
    torch.testing.assert_close(condition(training), expected[:, None])
    assert {"mean", "scale"} <= set(condition.state_dict())


def test_states_add_a_row_of_a_table_to_the_hidden_layer() -> None:
    torch.manual_seed(0)
    condition = build_condition(ConditionConfig(size=4, width=5, states=3), WIDTH, TOKENS)
    assert isinstance(condition, VectorCondition)
    given = torch.randn(4, 4)
    states = torch.tensor([2, 0, 2, 1])
    p = dict(condition.named_parameters())
    hidden = given @ p["mlp.0.weight"].T + p["mlp.0.bias"] + p["state.weight"][states]
    expected = hidden * torch.sigmoid(hidden) @ p["mlp.2.weight"].T + p["mlp.2.bias"]
    embedded = condition(torch.cat([given, states[:, None]], 1))
    torch.testing.assert_close(embedded, expected[:, None])
    dropped = condition(torch.cat([given, states[:, None]], 1), torch.tensor([True, False, True, False]))
    assert torch.equal(dropped[[0, 2]], condition.null.expand(2, 1, -1))
    assert torch.equal(dropped[[1, 3]], embedded[[1, 3]])


def test_dropped_vectors_become_the_null_vector_and_train_it() -> None:
    condition = vector()
    torch.nn.init.normal_(condition.null)
    given = torch.randn(3, 4)
    embedded = condition(given, torch.tensor([False, True, False]))
    assert torch.equal(embedded[1, 0], condition.null)
    assert torch.equal(embedded[[0, 2]], condition(given)[[0, 2]])
    (gradient,) = torch.autograd.grad(embedded.sum(), condition.null)
    assert torch.equal(gradient, torch.ones(WIDTH))


def test_permutation_states_are_rows_of_a_table() -> None:
    condition = build_condition(ConditionConfig(kind=ConditionKind.permutation, size=9), WIDTH, TOKENS)
    assert isinstance(condition, PermutationState)
    states = torch.tensor([8, 0, 8])
    assert torch.equal(condition(states), condition.embedding.weight[states, None])
    dropped = condition(states, torch.tensor([True, False, False]))
    assert torch.equal(dropped[0], torch.zeros(1, WIDTH))
    assert torch.equal(dropped[1:], condition.embedding.weight[states[1:], None])


def test_no_condition_is_zero() -> None:
    condition = build_condition(ConditionConfig(kind=ConditionKind.none), WIDTH, TOKENS)
    assert isinstance(condition, NoCondition)
    assert torch.equal(condition(torch.zeros(3, 0)), torch.zeros(3, 1, WIDTH))
    dropped = condition(torch.zeros(3, 0), torch.ones(3, dtype=torch.bool))
    assert torch.equal(dropped, torch.zeros(3, 1, WIDTH))
    assert not condition.state_dict()


@pytest.mark.parametrize("kind", [ConditionKind.vector, ConditionKind.permutation])
def test_a_size_is_needed(kind: ConditionKind) -> None:
    with pytest.raises(RPGError, match=r"condition\.size: expected at least 1"):
        build_condition(ConditionConfig(kind=kind, size=0), WIDTH, TOKENS)
    with pytest.raises(RPGError, match=r"condition\.states: expected at least 0, got -1"):
        build_condition(ConditionConfig(size=3, states=-1), WIDTH, TOKENS)


@pytest.mark.parametrize(("value", "count"), [(0.1, 3066), (0.3333, 100), (0.7, 3066), (1e-6, 50)])
def test_a_column_that_never_varies_has_no_scale(value: float, count: int) -> None:
    condition = VectorCondition(2, 4, 8)
    condition.fit(torch.stack([torch.full((count,), value), torch.linspace(0, 1, count)], 1))
    assert condition.scale[0] == 1
    torch.testing.assert_close(
        condition.scale[1], torch.linspace(0, 1, count).double().std(correction=0).float()
    )


@pytest.mark.parametrize("form", [ConditionForm.gated, ConditionForm.convolutional])
def test_states_beside_a_published_condition_are_added_to_all_tokens(form: ConditionForm) -> None:
    torch.manual_seed(0)
    condition = build_condition(ConditionConfig(size=4, width=5, states=3, form=form), WIDTH, TOKENS)
    assert isinstance(condition, GatedCondition | ConvolutionalCondition)
    assert condition.state is not None
    given = torch.cat([torch.randn(1, 4).expand(3, -1), torch.tensor([[0.0], [1.0], [2.0]])], 1)
    embedded = condition(given)
    assert embedded.shape == (3, TOKENS, WIDTH)
    rows = condition.state.weight
    for state in (1, 2):
        difference = (rows[state] - rows[0]).expand(TOKENS, -1)
        torch.testing.assert_close(embedded[state] - embedded[0], difference)


@pytest.mark.parametrize("last_tokens", [1, 8, 500])
def test_a_gated_vector_reaches_the_last_tokens_alone(last_tokens: int) -> None:
    config = ConditionConfig(size=4, width=5, form=ConditionForm.gated, last_tokens=last_tokens)
    embedded = build_condition(config, WIDTH, TOKENS)(torch.randn(2, 4))
    assert embedded.shape == (2, TOKENS, WIDTH)
    reached = min(last_tokens, TOKENS)
    assert torch.equal(embedded[:, : TOKENS - reached], torch.zeros(2, TOKENS - reached, WIDTH))
    assert (embedded[:, TOKENS - reached :] != 0).any(2).all()
