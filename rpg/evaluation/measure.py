"""Measuring generated networks against originals, baselines and the training set.

The module takes networks as state dicts, and two functions that know the tasks: one says what networks answer
on the held-out images, the other what they should answer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.collection.layout import Encoded, Layout
from rpg.evaluation.baselines import centre, majority_accuracy, nearest_tasks, ridge
from rpg.evaluation.distance import weight_distances
from rpg.evaluation.results import Evaluated, TaskSplit
from rpg.evaluation.similarity import add_noise

Condition = tuple[float, ...]
StateDict = Mapping[str, Tensor]
Predict = Callable[[list[dict[str, Tensor]]], Tensor]
"""Maps networks to their answers on the held-out images, bool [networks, images]."""
Labels = Callable[[Sequence[Condition]], Tensor]
"""Maps conditions to the right answers on the held-out images, bool [conditions, images]."""
TaskName = Callable[[Condition], str]
"""Maps a condition to the name of its task; different tasks have different names."""

RIDGE_ORDERS = (1, 2, 3)


@dataclass(frozen=True)
class Network:
    """A trained or generated network of one task."""

    name: str
    condition: Condition
    split: TaskSplit
    state_dict: dict[str, Tensor]


@dataclass(frozen=True)
class TrainingSet:
    """The checkpoints that the generator learned from: `flatten`ed values [m, P] and their conditions."""

    values: Tensor
    conditions: list[Condition]


@dataclass(frozen=True)
class Measured:
    """The fields of `Results` that come from networks."""

    originals: list[Evaluated]
    generated: list[Evaluated]
    noised: dict[float, list[Evaluated]]
    baselines: dict[str, dict[str, float]]
    sibling_distances: list[float]


def flatten(layout: Layout, state_dict: StateDict) -> Tensor:
    """All normalised values of a checkpoint in a row, float32 [P], without padding."""
    return layout.encode(state_dict).tokens[layout.mask()]


def unflatten(layout: Layout, values: Tensor) -> dict[str, Tensor]:
    """The checkpoint with these values [P], the inverse of `flatten`; constants are the layout's."""
    tokens = torch.zeros(layout.tokens, layout.token_size)
    tokens[layout.mask()] = values
    return layout.decode(Encoded(tokens, layout.constants))


def measure(
    layout: Layout, training: TrainingSet, originals: Sequence[Network], generated: Sequence[Network],
    predict: Predict, labels: Labels, task_name: TaskName,
    noise_levels: Sequence[float], ridge_penalty: float, seed: int,
) -> Measured:  # fmt: skip
    """Evaluate all networks, with everything that the report compares generated networks with.

    Args:
        layout: of the collection.
        training: what the generator learned from.
        originals: trained networks of the tasks that were generated for.
        generated: networks from the generator.
        predict: gives the networks' answers on the held-out images.
        labels: gives the right answers.
        task_name: names tasks.
        noise_levels: of noised originals.
        ridge_penalty: of the ridge baselines.
        seed: of the noise on noised originals.
    """
    unseen = list(dict.fromkeys(n.condition for n in generated if n.split == TaskSplit.unseen))
    heldout = [n for n in originals if n.split == TaskSplit.unseen]
    distances = weight_distances(
        torch.stack([flatten(layout, network.state_dict) for network in generated]),
        training.values,
        [task_name(condition) for condition in training.conditions],
        torch.stack([flatten(layout, network.state_dict) for network in heldout]) if heldout else None,
    )
    of_heldout = dict(zip([n.name for n in heldout], distances.heldout.tolist(), strict=False))
    noise = torch.Generator().manual_seed(seed)
    noised_networks = {
        level: [
            Network(f"{n.name} + {level:g}", n.condition, n.split, add_noise(n.state_dict, level, noise))
            for n in originals
        ]
        for level in noise_levels
    }

    def evaluate(networks: Sequence[Network], distances: Sequence[float | None]) -> list[Evaluated]:
        if not networks:
            return []
        wrong = predict([n.state_dict for n in networks]) != labels([n.condition for n in networks])
        return [
            Evaluated(
                name=network.name,
                task=task_name(network.condition),
                split=network.split,
                accuracy=1 - row.float().mean().item(),
                wrong=row.numpy(),
                condition=network.condition,
                distance=distance,
            )
            for network, row, distance in zip(networks, wrong, distances, strict=True)
        ]

    baselines = _baselines(layout, training, unseen, predict, labels, ridge_penalty) if unseen else {}
    tasks = [task_name(condition) for condition in unseen]
    return Measured(
        originals=evaluate(originals, [of_heldout.get(n.name) for n in originals]),
        generated=evaluate(generated, distances.generated.tolist()),
        noised={level: evaluate(group, [None] * len(group)) for level, group in noised_networks.items()},
        baselines={name: dict(zip(tasks, row, strict=True)) for name, row in baselines.items()},
        sibling_distances=distances.siblings.tolist(),
    )


def _baselines(
    layout: Layout, training: TrainingSet, unseen: list[Condition], predict: Predict, labels: Labels,
    ridge_penalty: float,
) -> dict[str, list[float]]:  # fmt: skip
    """Each baseline's accuracies on the unseen tasks, in the order of `unseen`."""
    right = labels(unseen)

    def accuracies(values: Tensor) -> list[float]:
        answers = predict([unflatten(layout, row) for row in values])
        found: list[float] = (answers == right).float().mean(1).tolist()
        return found

    known, asked = torch.tensor(training.conditions), torch.tensor(unseen)
    baselines = {
        f"ridge_{order}": accuracies(ridge(known, training.values, asked, order, ridge_penalty))
        for order in RIDGE_ORDERS
    }
    baselines["centre"] = accuracies(centre(training.values).expand(len(unseen), -1))
    baselines["nearest_task"] = [
        (predict([unflatten(layout, training.values[row]) for row in rows]) == answers).float().mean().item()
        for rows, answers in zip(nearest_tasks(known, asked), right, strict=True)
    ]
    baselines["majority"] = [majority_accuracy(row) for row in right]
    return baselines
