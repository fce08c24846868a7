"""From a ten-class backbone to binary classifiers: their starting points and losses."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rpg.tasks.families import Task

SETS_WEIGHT = 4.0
"""Weight of the sets in `class_and_set_loss`, chosen on validation tasks (docs/ablations.md)."""


def with_fresh_heads(backbone: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """`count` stacked copies of a backbone, each with a new head of zeros for one output.

    A head that started as the sum of the backbone's rows for the task's classes would make the networks a
    simple function of their tasks (docs/ablations.md).
    """
    features = {name: value for name, value in backbone.items() if not name.startswith("head.")}
    start = {name: value.expand(count, *value.shape) for name, value in features.items()}
    weight = backbone["head.weight"]
    start["head.weight"] = weight.new_zeros(count, 1, weight.shape[1])
    start["head.bias"] = weight.new_zeros(count, 1)
    return start


def with_set_heads(backbone: dict[str, Tensor], sets: Tensor) -> dict[str, Tensor]:
    """Stacked copies of a backbone that was trained with `class_and_set_loss`, one for each set of classes.

    Args:
        backbone: its state dict.
        sets: [M, classes], 1 where a class is in the set.

    Returns:
        State dicts with a leading dimension M; a head's one output is the logit of "the class is in the set".
    """
    start = with_fresh_heads(backbone, len(sets))
    terms = _terms(sets.to(backbone["head.weight"]))
    for name in ("head.weight", "head.bias"):
        start[name] = torch.tensordot(terms, backbone[name][sets.shape[1] :], 1)[:, None]
    return start


def unstacked(models: dict[str, Tensor], names: list[str]) -> list[dict[str, Tensor]]:
    """The single state dicts of stacked ones, on the CPU, with their tensors in the order of `names`."""
    moved = {name: models[name].cpu() for name in names}
    return [{name: moved[name][i].clone() for name in names} for i in range(len(moved[names[0]]))]


def fine_tuned_by_copy(
    models: Sequence[tuple[Task, int]],
    names: list[str],
    train: Callable[[list[list[float]], int], dict[str, Tensor]],
) -> list[dict[str, Tensor]]:
    """Networks that are trained side by side, those of one copy together; a state dict each, on the CPU.

    Args:
        models: (task, copy) of each network.
        names: of their tensors, in order.
        train: called with the conditions of the tasks of a copy, and the copy; returns the trained networks,
            stacked.
    """
    trained: dict[tuple[str, int], dict[str, Tensor]] = {}
    for copy in dict.fromkeys(copy for _, copy in models):
        some = [task for task, number in models if number == copy]
        together = train([task.condition for task in some], copy)
        done = [(task.name, copy) for task in some]
        trained.update(zip(done, unstacked(together, names), strict=True))
    return [trained[task.name, copy] for task, copy in models]


def binary_loss(logits: Tensor, right: Tensor) -> Tensor:
    """Mean cross-entropy of each model: logits [M, N, 1] against bool or 0/1 [M, N], to [M]."""
    right = right.to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits[..., 0], right, reduction="none").mean(1)


def ten_class_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean cross-entropy of each model: logits [M, N, 10] against int64 [M, N], to [M]."""
    return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), reduction="none").view_as(classes).mean(1)


def class_and_set_loss(logits: Tensor, classes: Tensor, sets: Tensor) -> Tensor:
    """Cross-entropy of the class, and of whether it is in each of some sets, as the mean of each model.

    The first outputs are the classes' logits. The others, one a class and one more, are the terms of a sum:
    the logit of a set adds those of its classes, subtracts those of all others, and adds the last. So the
    features become such that a linear head answers for any set. Networks that start from them are better
    after one epoch than others after three (docs/ablations.md).

    Args:
        logits: [M, N, 2 · C + 1].
        classes: int64 [M, N].
        sets: [S, C], 1 where a class is in the set.

    Returns:
        [M].
    """
    count = sets.shape[1]
    of_sets = logits[..., count:] @ _terms(sets).T
    right = sets.T[classes]
    errors = F.binary_cross_entropy_with_logits(of_sets, right, reduction="none").mean((1, 2))
    return ten_class_loss(logits[..., :count], classes) + SETS_WEIGHT * errors


def _terms(sets: Tensor) -> Tensor:
    """How the terms of sets add up, [M, C + 1]: 1 where a class is in the set, -1 where it is not, and 1."""
    return torch.cat([2 * sets - 1, torch.ones_like(sets[:, :1])], 1)
