"""What a generator must beat: ridge regression, the nearest training task, the centre, the majority class.

All work on plain matrices: flattened weights [checkpoints, P] and conditions [checkpoints, C].
"""

from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement
from math import comb
from typing import TypeVar

import torch
from torch import Tensor

from rpg.errors import RPGError

T = TypeVar("T")

MAX_FEATURES = 20_000
"""Most polynomial features that ridge regression takes: a gigabyte at 6,000 checkpoints."""
CHUNK_ELEMENTS = 1 << 24
"""Values of the training weights that are held in float64 at a time."""


def centre(weights: Tensor, chunk_elements: int = CHUNK_ELEMENTS) -> Tensor:
    """The mean checkpoint: [m, P] -> [P], summed in float64, `chunk_elements` values at a time, in the dtype
    given."""
    result = weights.new_empty(weights.shape[1])
    step = max(1, chunk_elements // max(1, len(weights)))
    for start in range(0, weights.shape[1], step):
        columns = slice(start, start + step)
        result[columns] = weights[:, columns].mean(dim=0, dtype=torch.float64).to(weights.dtype)
    return result


def majority_accuracy(labels: Tensor) -> float:
    """Accuracy of always answering the most frequent class.

    Args:
        labels: [images] integer or bool, of the images that networks are evaluated on.
    """
    if not labels.numel():
        raise RPGError("labels: expected at least one, got none")
    return float(torch.unique(labels, return_counts=True)[1].max()) / labels.numel()


def is_binary(conditions: Tensor) -> bool:
    """Whether every value is 0 or 1, so that powers of a feature are the feature itself."""
    return bool(((conditions == 0) | (conditions == 1)).all())


def feature_count(width: int, order: int, binary: bool) -> int:
    """Polynomial features of a condition of `width` values, up to `order`, without the bias."""
    if binary:
        return sum(comb(width, degree) for degree in range(1, order + 1))
    return comb(width + order, order) - 1


def polynomial_features(conditions: Tensor, order: int, binary: bool) -> Tensor:
    """Products of features up to `order`, without the bias.

    Args:
        conditions: [m, C].
        order: 1, 2, 3 …
        binary: products of distinct features alone (see `is_binary`); otherwise powers as well.

    Returns:
        float64 [m, `feature_count(C, order, binary)`], by degree, then lexicographic.

    Raises:
        RPGError: if order is below 1 or there would be more than `MAX_FEATURES`.
    """
    width = conditions.shape[1]
    if order < 1:
        raise RPGError(f"ridge order: expected at least 1, got {order}")
    if feature_count(width, order, binary) > MAX_FEATURES:
        raise RPGError(
            f"ridge of order {order}: a condition of {width} values has "
            f"{feature_count(width, order, binary)} features, expected at most {MAX_FEATURES}"
        )
    values = conditions.double()
    choose = combinations if binary else combinations_with_replacement
    parts = []
    for degree in range(1, order + 1):
        chosen = torch.tensor(list(choose(range(width), degree)), dtype=torch.int64).view(-1, degree)
        parts.append(values[:, chosen].prod(dim=-1))
    return torch.cat(parts, dim=1)


def ridge(
    train_conditions: Tensor,
    train_weights: Tensor,
    conditions: Tensor,
    order: int,
    penalty: float,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> Tensor:
    """Weights predicted from conditions by ridge regression on polynomial features.

    Minimises |Y − 1b − XB|² + penalty · |B|² (the bias b is not penalised) by the normal equations in
    float64, in whichever of primal (features) and dual (checkpoints) is smaller. The prediction is linear in
    the training weights, so that only a [n, m] matrix is ever solved for; weights pass through in chunks.

    Args:
        train_conditions: [m, C].
        train_weights: [m, P].
        conditions: [n, C] to predict for.
        order: highest degree of the features.
        penalty: at least 0; at 0 the solution of least norm.
        chunk_elements: values of the training weights held in float64 at a time.

    Returns:
        [n, P] in the dtype of `train_weights`.

    Raises:
        RPGError: if shapes disagree, or the features are too many (`polynomial_features`).
    """
    if train_conditions.ndim != 2 or len(train_conditions) != len(train_weights):
        raise RPGError(
            f"ridge: expected one condition a training checkpoint, got conditions "
            f"{list(train_conditions.shape)} for weights {list(train_weights.shape)}"
        )
    if conditions.ndim != 2 or conditions.shape[1] != train_conditions.shape[1]:
        raise RPGError(
            f"ridge: expected conditions [n, {train_conditions.shape[1]}], got {list(conditions.shape)}"
        )
    binary = is_binary(train_conditions) and is_binary(conditions)
    features = polynomial_features(train_conditions, order, binary)
    mean = features.mean(dim=0)
    features = features - mean
    queries = polynomial_features(conditions, order, binary) - mean
    checkpoints, count = features.shape
    if count <= checkpoints:
        smoother = queries @ _solve(features.T @ features, features.T, penalty)
    else:
        smoother = _solve(features @ features.T, (queries @ features.T).T, penalty).T
    smoother = smoother + 1 / checkpoints
    predicted = train_weights.new_empty(len(conditions), train_weights.shape[1])
    step = max(1, chunk_elements // checkpoints)
    for start in range(0, train_weights.shape[1], step):
        columns = slice(start, start + step)
        predicted[:, columns] = (smoother @ train_weights[:, columns].double()).to(predicted.dtype)
    return predicted


def nearest_tasks(train_conditions: Tensor, conditions: Tensor, limit: int = 8) -> list[list[int]]:
    """Training checkpoints to compare with: the first one of each nearest training task.

    The nearest tasks have the smallest euclidean distance of conditions. It orders class bits as the Hamming
    distance does, and ties are common there (one bit more, one bit less). All tied tasks are returned; the
    baseline is the mean accuracy over them, so that it does not depend on an arbitrary choice.

    Args:
        train_conditions: [m, C]; equal rows are checkpoints of one task.
        conditions: [n, C].
        limit: most tied tasks a query; when there are more, evenly spaced ones in collection order.

    Returns:
        Per query, rows of `train_conditions`, ascending.
    """
    if not len(train_conditions):
        raise RPGError("nearest task: expected at least one training checkpoint, got none")
    first_rows: dict[tuple[float, ...], int] = {}
    for row, condition in enumerate(train_conditions.double().tolist()):
        first_rows.setdefault(tuple(condition), row)
    rows = list(first_rows.values())
    tasks = train_conditions[rows].double()
    result = []
    for condition in conditions.double():
        squared = (tasks - condition).square().sum(dim=1)
        tied = [rows[i] for i in (squared == squared.min()).nonzero().flatten().tolist()]
        result.append(evenly_spaced(tied, limit))
    return result


def evenly_spaced(values: Sequence[T], limit: int) -> list[T]:
    """All values, or `limit` of them at even distances, in order."""
    if len(values) <= limit:
        return list(values)
    return [values[i * len(values) // limit] for i in range(limit)]


def _solve(gram: Tensor, right: Tensor, penalty: float) -> Tensor:
    """(gram + penalty · I)⁻¹ right, or gram⁺ right at penalty 0, where gram may be singular."""
    if penalty == 0:
        inverse: Tensor = torch.linalg.pinv(gram, hermitian=True)
        return inverse @ right
    penalised = gram + penalty * torch.eye(len(gram), dtype=gram.dtype)
    return torch.cholesky_solve(right, torch.linalg.cholesky(penalised))
