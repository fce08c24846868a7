"""Binary tasks "is the class one of this set?" over ten classes, numbered as in the published work.

A task's id is its ten class bits read as a binary number, class 0 first: 1 … 1022. For 0 and 1023 the answer
would be the same for all classes.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from rpg.collection.conditions import bits
from rpg.errors import RPGError
from rpg.tasks.families import Asked, Task

CLASSES = 10
ALL_TASKS = range(1, 2**CLASSES - 1)
HELD_OUT_TASKS = (
    314, 482, 589, 197, 462, 111, 101, 278, 793, 279, 653, 238, 1001, 141, 884, 592, 502, 643, 383, 128,
)  # fmt: skip
"""The twenty tasks that the published work holds out as unseen."""


def class_bits(task: int) -> list[float]:
    """The condition of a task: one value a class, 1 where the class is in the set."""
    return bits(task, CLASSES)


def task_of(condition: Sequence[float]) -> int:
    """The id of the task with this condition."""
    return int("".join("1" if value else "0" for value in condition), 2)


def task_name(condition: Sequence[float]) -> str:
    """The id of the task with this condition, as text."""
    return str(task_of(condition))


def in_set(conditions: Sequence[Sequence[float]], classes: Tensor) -> Tensor:
    """Whether each of `classes` (int64 [N]) is in the set that each condition names, bool [conditions, N]."""
    return torch.tensor(conditions).bool().to(classes.device)[:, classes]


def class_labels(condition: Asked, classes: Tensor) -> Tensor:
    """Whether each of `classes` (int64 [N]) is in the set that the condition names, bool [N].

    Raises:
        RPGError: for anything but ten class bits.
    """
    return class_labels_many([condition], classes)[0]


def class_labels_many(conditions: Sequence[Asked], classes: Tensor) -> Tensor:
    """`class_labels` for several conditions, bool [conditions, N]."""
    sets = []
    for condition in conditions:
        if not isinstance(condition, Sequence) or isinstance(condition, str) or len(condition) != CLASSES:
            raise RPGError(f"expected a condition of {CLASSES} class bits, got {condition!r:.80}")
        sets.append(condition)
    return in_set(sets, classes)


def class_tasks(validation_tasks: int, seed: int) -> list[Task]:
    """Every task: `heldout` the twenty, `validation` some drawn by `seed`, else `train`.

    Raises:
        RPGError: if there are too many validation tasks, or fewer than none.
    """
    free = [task for task in ALL_TASKS if task not in HELD_OUT_TASKS]
    if not 0 <= validation_tasks <= len(free) - 2:
        raise RPGError(
            f"collect.validation_tasks: expected 0 to {len(free) - 2}, so that some are left to train on, "
            f"got {validation_tasks}"
        )
    validation = set(random.Random(seed).sample(free, validation_tasks))
    return [
        Task(
            str(task),
            class_bits(task),
            "heldout" if task in HELD_OUT_TASKS else "validation" if task in validation else "train",
        )
        for task in ALL_TASKS
    ]
