"""Ensembles of the networks of one task: what the majority of them answers.

Networks that err on different inputs gain by voting, copies of one network gain nothing. So the gain of
generated networks beside that of originals says whether generation keeps the variety of training.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from rpg.evaluation.baselines import evenly_spaced
from rpg.evaluation.results import Evaluated

LEAST_NETWORKS = 3
"""The smallest ensemble in which a majority can correct a network."""
MOST_ENSEMBLES = 20
"""Ensembles of one task that are averaged over."""


class Vote(NamedTuple):
    """Ensembles of one task, averaged over the choices of their members."""

    accuracy: float
    """Of the ensemble."""
    members: float
    """Mean accuracy of the members."""


@dataclass(frozen=True)
class Ensembles:
    """Ensembles of one size, of originals and of generated networks, by task."""

    size: int
    originals: dict[str, Vote]
    generated: dict[str, Vote]


def ensembles(originals: Sequence[Evaluated], generated: Sequence[Evaluated]) -> Ensembles | None:
    """Ensembles of all tasks that have at least three originals and three generated networks.

    All are of one size, the largest odd number of networks that each of these tasks has of either kind.

    Args:
        originals: trained networks.
        generated: generated networks.

    Returns:
        None if there is no such task, or answers were not looked at.
    """
    of_originals, of_generated = _by_task(originals), _by_task(generated)
    least = {
        task: min(len(of_originals[task]), len(networks))
        for task, networks in of_generated.items()
        if task in of_originals
    }
    tasks = [task for task, number in least.items() if number >= LEAST_NETWORKS]
    if not tasks:
        return None
    number = min(least[task] for task in tasks)
    size = number if number % 2 else number - 1
    return Ensembles(
        size,
        {task: averaged_vote(of_originals[task], size) for task in tasks},
        {task: averaged_vote(of_generated[task], size) for task in tasks},
    )


def averaged_vote(networks: Sequence[Evaluated], size: int) -> Vote:
    """The vote of `size` networks of one task, averaged over choices that favour no network (`choices`).

    Args:
        networks: of one task, with answers.
        size: how many of them vote.
    """
    answers = torch.stack([network.answers for network in networks if network.answers is not None])
    wrong = torch.stack([torch.from_numpy(n.wrong) for n in networks if n.wrong is not None])
    chosen = choices(len(answers), size)
    votes = [1 - majority_is_wrong(answers[some], wrong[some]).double().mean() for some in chosen]
    members = [1 - wrong[some].double().mean() for some in chosen]
    return Vote(float(torch.stack(votes).mean()), float(torch.stack(members).mean()))


def majority_is_wrong(answers: Tensor, wrong: Tensor) -> Tensor:
    """Whether the most frequent answer to each input is wrong.

    Of equally frequent answers the smallest counts, which happens with more than two classes only, if the
    number of networks is odd.

    Args:
        answers: [networks, inputs].
        wrong: bool [networks, inputs]: whether they are.

    Returns:
        bool [inputs].
    """
    # Some network gave the most frequent answer, so whether that one is wrong is known.
    first = (answers == answers.mode(dim=0).values).int().argmax(dim=0, keepdim=True)
    return wrong.gather(0, first)[0]


def choices(networks: int, size: int) -> list[list[int]]:
    """Which networks form an ensemble, for several ensembles that together favour none of them.

    These are all choices, if they are few. Otherwise an evenly spaced one is moved along by one network at a
    time, so that each takes part equally often (about equally, with more networks than ensembles).

    Args:
        networks: to choose from.
        size: of an ensemble, at most `networks`.

    Returns:
        At most `MOST_ENSEMBLES` lists of `size` different indices.
    """
    if comb(networks, size) <= MOST_ENSEMBLES:
        return [list(some) for some in combinations(range(networks), size)]
    spaced = evenly_spaced(range(networks), size)
    return [
        [(start + index) % networks for index in spaced]
        for start in evenly_spaced(range(networks), MOST_ENSEMBLES)
    ]


def _by_task(networks: Sequence[Evaluated]) -> dict[str, list[Evaluated]]:
    """The networks whose answers were looked at."""
    known: dict[str, list[Evaluated]] = {}
    for network in networks:
        if network.answers is not None and network.wrong is not None:
            known.setdefault(network.task, []).append(network)
    return known
