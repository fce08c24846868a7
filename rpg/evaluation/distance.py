"""Distance in weight space to the nearest training checkpoint, so that copying shows.

A generator that hands out its training set scores well on accuracy. Its networks then lie at distance 0 from
a training checkpoint, while two checkpoints that were trained for the same task (siblings) lie far apart. So
the distances between siblings are what the generated networks' distances are compared with.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.errors import RPGError

CHUNK_ELEMENTS = 1 << 22
"""Values of a matrix that are held in float64 at a time."""
_CANDIDATES = 8
"""Training checkpoints whose distance to a query is computed exactly."""


@dataclass(frozen=True)
class Nearest:
    """The nearest training checkpoint of each query."""

    distance: Tensor
    """float64 [n], euclidean, in the units of the weights given."""
    index: Tensor
    """int64 [n]: its row among the training checkpoints."""


@dataclass(frozen=True)
class WeightDistances:
    """Distances to the nearest training checkpoint, in units of the training set's own spread."""

    scale: float
    """Root-mean-square distance of training checkpoints to their centre; the unit of the others."""
    generated: Tensor
    """float64 [generated]."""
    nearest: Tensor
    """int64 [generated]: row of the nearest training checkpoint."""
    heldout: Tensor
    """float64 [held-out originals]: trained networks for tasks outside the training set; may be empty."""
    siblings: Tensor
    """float64 [training checkpoints with a sibling]: to the nearest other checkpoint of the same task."""
    generated_siblings: Tensor
    """float64 [generated networks with a sibling]: to the nearest other generated one of the same task."""
    generated_to_centre: Tensor
    """float64 [generated]: to the mean training checkpoint."""
    heldout_to_centre: Tensor
    """float64 [held-out originals]: to the mean training checkpoint."""


def weight_distances(
    generated: Tensor,
    generated_tasks: Sequence[str],
    train: Tensor,
    train_tasks: Sequence[str],
    heldout: Tensor | None = None,
) -> WeightDistances:
    """How far generated networks are from the training set, beside held-out originals and siblings.

    Args:
        generated: [n, P] flattened weights, in any one space (weight space, or normalised tokens).
        generated_tasks: [n] the task of each; siblings share one.
        train: [m, P] of the training checkpoints, in the same space.
        train_tasks: [m] the task of each; siblings share one.
        heldout: [h, P] of originals for tasks outside the training set.

    Raises:
        RPGError: if shapes disagree, or all training checkpoints are equal.
    """
    for name, tasks, rows in (
        ("train_tasks", train_tasks, train),
        ("generated_tasks", generated_tasks, generated),
    ):
        if len(tasks) != len(rows):
            raise RPGError(f"{name}: expected {len(rows)}, one a checkpoint, got {len(tasks)}")
    scale = spread(train)
    if scale == 0:
        raise RPGError("training checkpoints: all are equal, so distances to them have no unit")
    near = nearest_checkpoint(generated, train)
    heldout = train[:0] if heldout is None else heldout
    far = nearest_checkpoint(heldout, train).distance
    centre = train.mean(dim=0, dtype=torch.float64)[None]
    return WeightDistances(
        scale=scale,
        generated=near.distance / scale,
        nearest=near.index,
        heldout=far / scale,
        siblings=sibling_distances(train, train_tasks) / scale,
        generated_siblings=sibling_distances(generated, generated_tasks) / scale,
        generated_to_centre=nearest_checkpoint(generated, centre).distance / scale,
        heldout_to_centre=nearest_checkpoint(heldout, centre).distance / scale,
    )


def spread(train: Tensor) -> float:
    """Root-mean-square euclidean distance of the rows of [m, P] to their mean."""
    total = 0.0
    for columns in _column_chunks(train.shape[1], len(train)):
        part = train[:, columns].double()
        total += float((part - part.mean(dim=0)).square().sum())
    return float((total / len(train)) ** 0.5)


def nearest_checkpoint(queries: Tensor, train: Tensor, chunk_elements: int = CHUNK_ELEMENTS) -> Nearest:
    """Nearest row of `train` for each row of `queries`, by euclidean distance.

    Candidates come from float32 matrix products about the training centre. The distances returned are
    computed directly in float64, because |q|² + |w|² − 2 q·w loses all its digits for a near copy, and near
    copies are what these distances are to reveal.

    Args:
        queries: [n, P].
        train: [m, P].
        chunk_elements: values held in float64 at a time.

    Raises:
        RPGError: if the widths differ or `train` is empty.
    """
    if queries.ndim != 2 or train.ndim != 2 or queries.shape[1] != train.shape[1]:
        raise RPGError(
            f"weights: expected [models, P] of equal width, got {list(queries.shape)} and {list(train.shape)}"
        )
    if not len(train):
        raise RPGError("training checkpoints: expected at least one, got none")
    distances, indices = [torch.empty(0, dtype=torch.float64)], [torch.empty(0, dtype=torch.int64)]
    for block in torch.split(queries, max(1, chunk_elements // len(train))):
        count = min(_CANDIDATES, len(train))
        squared = _squared_distances(block, train, chunk_elements)
        candidates = squared.topk(count, dim=1, largest=False).indices
        rows = torch.arange(len(block)).repeat_interleave(count)
        exact = _pair_distances(block, train, rows, candidates.flatten(), chunk_elements).view(-1, count)
        best = exact.argmin(dim=1, keepdim=True)
        distances.append(exact.gather(1, best).squeeze(1))
        indices.append(candidates.gather(1, best).squeeze(1))
    return Nearest(torch.cat(distances), torch.cat(indices))


def sibling_distances(train: Tensor, tasks: Sequence[str]) -> Tensor:
    """Distance of each training checkpoint to the nearest other one of its task (leave-one-out).

    Args:
        train: [m, P].
        tasks: [m].

    Returns:
        float64 [k], for the k checkpoints that share their task with another, in order.
    """
    members: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        members.setdefault(task, []).append(row)
    pairs: list[tuple[int, int]] = []
    for rows in members.values():
        if len(rows) > _CANDIDATES:
            # The pairs of a large task are too many to compare directly.
            squared = _squared_distances(train[rows], train[rows], CHUNK_ELEMENTS)
            near = squared.fill_diagonal_(torch.inf).topk(_CANDIDATES, dim=1, largest=False).indices
            pairs += [(row, rows[j]) for row, other in zip(rows, near.tolist(), strict=True) for j in other]
        else:
            pairs += [(row, other) for row in rows for other in rows if other != row]
    if not pairs:
        return torch.empty(0, dtype=torch.float64)
    first, second = torch.tensor(pairs).unbind(1)
    nearest = torch.full((len(train),), torch.inf, dtype=torch.float64)
    nearest.scatter_reduce_(0, first, _pair_distances(train, train, first, second), "amin")
    return nearest[nearest.isfinite()]


def _squared_distances(queries: Tensor, train: Tensor, chunk_elements: int) -> Tensor:
    cross = torch.zeros(len(queries), len(train), dtype=torch.float64)
    query_norms, train_norms = cross.new_zeros(len(queries)), cross.new_zeros(len(train))
    for columns in _column_chunks(train.shape[1], len(train) + len(queries), chunk_elements):
        part = train[:, columns].double()
        centre = part.mean(dim=0)
        near, far = (queries[:, columns].double() - centre).float(), (part - centre).float()
        cross += near @ far.T
        query_norms += near.square().sum(dim=1)
        train_norms += far.square().sum(dim=1)
    return query_norms[:, None] + train_norms - 2 * cross


def _pair_distances(
    first: Tensor, second: Tensor, rows: Tensor, others: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Euclidean distances of `first[rows[i]]` to `second[others[i]]`, directly, in float64."""
    block = max(1, chunk_elements // max(1, first.shape[1]))
    result = []
    for left, right in zip(torch.split(rows, block), torch.split(others, block), strict=True):
        squared = torch.zeros(len(left), dtype=torch.float64)
        for columns in _column_chunks(first.shape[1], len(left), chunk_elements):
            squared += (first[left, columns].double() - second[right, columns].double()).square().sum(dim=1)
        result.append(squared.sqrt())
    return torch.cat(result) if result else torch.empty(0, dtype=torch.float64)


def _column_chunks(width: int, rows: int, chunk_elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    step = max(1, chunk_elements // max(1, rows))
    return (slice(start, start + step) for start in range(0, width, step))
