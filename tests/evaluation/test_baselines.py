import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.preprocessing import PolynomialFeatures

from rpg.errors import RPGError
from rpg.evaluation.baselines import (
    centre,
    feature_count,
    majority_accuracy,
    nearest_tasks,
    polynomial_features,
    ridge,
)


def sklearn_ridge(
    train_conditions: torch.Tensor,
    weights: torch.Tensor,
    conditions: torch.Tensor,
    order: int,
    penalty: float,
    interaction_only: bool,
) -> np.ndarray:
    features = PolynomialFeatures(order, interaction_only=interaction_only, include_bias=False)
    model = Ridge(alpha=penalty, fit_intercept=True, solver="svd")
    model.fit(features.fit_transform(train_conditions.double().numpy()), weights.double().numpy())
    return np.asarray(model.predict(features.transform(conditions.double().numpy())))


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 3),
    st.sampled_from([(60, 5), (12, 6), (4, 8)]),
    st.sampled_from([1e-3, 0.1, 10.0]),
    st.booleans(),
)
def test_ridge_equals_sklearn(
    seed: int, order: int, shape: tuple[int, int], penalty: float, binary: bool
) -> None:
    """More checkpoints than features (primal) and fewer (dual), bits and real conditions."""
    generator = torch.Generator().manual_seed(seed)
    conditions = torch.randn(shape[0] + 7, shape[1], generator=generator)
    if binary:
        conditions = (conditions > 0).float()
    weights = torch.randn(shape[0], 13, generator=generator).double()
    train, queries = conditions[: shape[0]], conditions[shape[0] :]
    predicted = ridge(train, weights, queries, order, penalty)
    expected = sklearn_ridge(train, weights, queries, order, penalty, interaction_only=binary)
    np.testing.assert_allclose(predicted.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_ridge_in_chunks_and_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    conditions = (torch.rand(40, 6, generator=generator) > 0.5).float()
    weights = torch.randn(40, 101, generator=generator) + 100
    whole = ridge(conditions, weights, conditions[:5], 2, 1e-3)
    chunked = ridge(conditions, weights, conditions[:5], 2, 1e-3, chunk_elements=40 * 7)
    assert whole.dtype == torch.float32
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=1e-5)
    expected = sklearn_ridge(conditions, weights, conditions[:5], 2, 1e-3, interaction_only=True)
    np.testing.assert_allclose(whole.numpy(), expected, rtol=1e-5)


def test_ridge_recovers_an_interaction_exactly() -> None:
    conditions = torch.tensor([[a, b, c] for a in (0.0, 1.0) for b in (0.0, 1.0) for c in (0.0, 1.0)])
    weights = (3 + conditions[:, :1] * conditions[:, 1:2] - 2 * conditions[:, 2:]).double()
    assert torch.allclose(ridge(conditions[:7], weights[:7], conditions[7:], 2, 0.0), weights[7:], atol=1e-9)
    assert not torch.allclose(
        ridge(conditions[:7], weights[:7], conditions[7:], 1, 0.0), weights[7:], atol=0.1
    )


def test_without_penalty_a_singular_problem_has_the_solution_of_least_norm() -> None:
    generator = torch.Generator().manual_seed(1)
    conditions = torch.randn(5, 9, generator=generator).double()
    weights = torch.randn(5, 4, generator=generator).double()
    torch.testing.assert_close(ridge(conditions, weights, conditions, 1, 0.0), weights)


@given(st.integers(1, 7), st.integers(1, 3), st.booleans())
def test_feature_count(width: int, order: int, binary: bool) -> None:
    conditions = torch.arange(2 * width).view(2, width).double()
    expected = PolynomialFeatures(order, interaction_only=binary, include_bias=False)
    values = expected.fit_transform(conditions.numpy())
    assert feature_count(width, order, binary) == values.shape[1]
    found = polynomial_features(conditions, order, binary).numpy()
    np.testing.assert_allclose(np.sort(found, axis=1), np.sort(values, axis=1))


def test_too_many_features_are_refused() -> None:
    with pytest.raises(RPGError, match=r"order 3.*at most"):
        polynomial_features(torch.randn(2, 384), 3, binary=False)
    with pytest.raises(RPGError, match="order"):
        polynomial_features(torch.randn(2, 3), 0, binary=False)


def test_ridge_refuses_other_shapes() -> None:
    with pytest.raises(RPGError, match=r"\[n, 3\]"):
        ridge(torch.zeros(4, 3), torch.zeros(4, 2), torch.zeros(1, 2), 1, 1.0)
    with pytest.raises(RPGError, match="one condition a training checkpoint"):
        ridge(torch.zeros(4, 3), torch.zeros(5, 2), torch.zeros(1, 3), 1, 1.0)


def test_nearest_tasks_by_hamming_distance_with_ties() -> None:
    generator = torch.Generator().manual_seed(3)
    train = (torch.rand(30, 5, generator=generator) > 0.5).float()
    train = train.repeat_interleave(2, dim=0)
    queries = (torch.rand(12, 5, generator=generator) > 0.5).float()
    for query, found in zip(queries, nearest_tasks(train, queries, limit=100), strict=True):
        hamming = (train != query).sum(dim=1).tolist()
        expected, met = [], set()
        for row, apart in enumerate(hamming):
            if apart == min(hamming) and tuple(train[row].tolist()) not in met:
                met.add(tuple(train[row].tolist()))
                expected.append(row)
        assert found == expected


def test_nearest_tasks_limit_is_even_and_deterministic() -> None:
    train = torch.eye(16)
    found = nearest_tasks(train, torch.zeros(1, 16))
    assert found == [[0, 2, 4, 6, 8, 10, 12, 14]] == nearest_tasks(train, torch.zeros(1, 16))
    with pytest.raises(RPGError, match="at least one"):
        nearest_tasks(torch.zeros(0, 4), torch.zeros(1, 4))


def test_nearest_task_with_real_conditions() -> None:
    assert nearest_tasks(torch.tensor([[0.1, 2.0], [0.5, 0.5], [9.0, 9.0]]), torch.tensor([[0.4, 0.7]])) == [
        [1]
    ]


def test_centre_is_the_mean_in_float64() -> None:
    weights = torch.tensor([1e8, 1.0, -1e8]).view(3, 1).repeat(1, 4)
    assert torch.equal(centre(weights), torch.full((4,), 1 / 3))


def test_majority_accuracy() -> None:
    assert majority_accuracy(torch.tensor([True, False, False, False])) == 0.75
    assert majority_accuracy(torch.tensor([2, 2, 0, 1, 2])) == pytest.approx(0.6)
    with pytest.raises(RPGError, match="labels"):
        majority_accuracy(torch.tensor([]))


def test_the_centre_is_summed_in_chunks() -> None:
    weights = torch.randn(7, 1001, generator=torch.Generator().manual_seed(0)) * 1e3
    expected = torch.from_numpy(weights.numpy().astype(np.float64).mean(axis=0)).float()
    for chunk_elements in (1, 70, 10**6):
        torch.testing.assert_close(centre(weights, chunk_elements), expected, rtol=1e-7, atol=0)
