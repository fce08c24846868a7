"""The networks of a run that is evaluated, by name and task: measured, and as values in a row."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rpg.collection.layout import Encoded, Layout
from rpg.evaluation.judge import Candidate, Judge, Measurement
from rpg.evaluation.results import TaskSplit
from rpg.tasks.families import Asked

Condition = tuple[float, ...]
StateDict = Mapping[str, Tensor]
TaskName = Callable[[Condition | None], str]
"""Maps a condition to the name of its task; different tasks have different names."""
BYTES_AT_ONCE = 2**30
"""A judge is given networks of about so many bytes at a time, which it may run side by side."""


@dataclass(frozen=True)
class Network:
    """A trained or generated network of one task."""

    name: str
    condition: Condition | None
    """None where the collection has no conditions."""
    split: TaskSplit
    state_dict: dict[str, Tensor]
    description: str | None = None
    """The text that the condition stands for, if it stands for one."""

    @property
    def asked(self) -> Asked:
        """What a judge is told about the network's task."""
        if self.description is not None:
            return self.description
        return None if self.condition is None else list(self.condition)


@dataclass(frozen=True)
class TrainingSet:
    """The checkpoints that the generator learned from: `flatten`ed values [m, P] and their conditions."""

    values: Tensor
    conditions: list[Condition] | None


def flatten(layout: Layout, state_dict: StateDict) -> Tensor:
    """All normalised values of a checkpoint in a row, float32 [P], without padding."""
    return layout.encode(state_dict).tokens[layout.mask()]


def unflatten(layout: Layout, values: Tensor) -> dict[str, Tensor]:
    """The checkpoint with these values [P], the inverse of `flatten`; constants are the layout's."""
    tokens = torch.zeros(layout.tokens, layout.token_size)
    tokens[layout.mask()] = values
    return layout.decode(Encoded(tokens, layout.constants))


def condition_name(condition: Condition | None) -> str:
    """A name for the task with this condition, where no family has one: its bits, or its values."""
    if condition is None:
        return "all"
    if all(value in (0, 1) for value in condition):
        return "".join(str(int(value)) for value in condition)
    shown = ", ".join(f"{value:.3g}" for value in condition[:3])
    # Many conditions look alike in a few digits of their first values.
    return f"{shown}… {hashlib.sha256(repr(condition).encode()).hexdigest()[:6]}"


def measurements(judge: Judge | None, networks: Iterable[Network], data_split: str) -> list[Measurement]:
    """What networks are worth on the data of `data_split`; nothing where there is no judge.

    Of networks that are made while this runs, few are in memory at a time.
    """
    rows: list[Measurement] = []
    some: list[Candidate] = []
    size = 0
    for network in networks:
        if judge is None:
            rows.append(Measurement({}))
            continue
        some.append(Candidate(network.name, network.state_dict, network.asked))
        size += sum(value.nbytes for value in network.state_dict.values())
        if size > BYTES_AT_ONCE:
            rows += judge.measure(some, data_split)
            some, size = [], 0
    return rows + (judge.measure(some, data_split) if judge and some else [])
