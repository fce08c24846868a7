"""Measuring generated networks against originals, baselines and the training set.

Distances in weight space need the weights alone. What networks are worth is measured by a judge, where there
is one."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from rpg.collection.layout import Encoded, Layout
from rpg.errors import RPGError
from rpg.evaluation.baselines import centre, evenly_spaced, nearest_tasks, ridge
from rpg.evaluation.distance import nearest_checkpoint, weight_distances
from rpg.evaluation.judge import Candidate, Judge, Measurement, metric_that_counts, with_metric
from rpg.evaluation.results import Evaluated, TaskSplit
from rpg.evaluation.similarity import add_noise
from rpg.tasks.families import Asked, Metric

Condition = tuple[float, ...]
StateDict = Mapping[str, Tensor]
TaskName = Callable[[Condition | None], str]
"""Maps a condition to the name of its task; different tasks have different names."""

RIDGE_ORDERS = (1, 2, 3)
_MOST_COPIES = 20
"""Noised training checkpoints whose distance to the training set is measured, for each level."""
_BYTES_AT_ONCE = 2**30
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


@dataclass(frozen=True)
class Measured:
    """The fields of `Results` that come from networks."""

    originals: list[Evaluated]
    generated: list[Evaluated]
    noised: dict[float, list[Evaluated]]
    baselines: dict[str, dict[str, float]]
    sibling_distances: list[float]
    generated_distances: list[float]
    noised_distances: dict[float, list[float]]
    metric: Metric | None
    other_metrics: list[Metric]
    left_out: list[str]


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


def measure(
    layout: Layout, training: TrainingSet, originals: Sequence[Network], generated: Sequence[Network],
    judge: Judge | None, data_split: str, task_name: TaskName,
    noise_levels: Sequence[float], ridge_penalty: float, seed: int,
) -> Measured:  # fmt: skip
    """Evaluate all networks, with everything that the report compares generated networks with.

    Args:
        layout: of the collection.
        training: what the generator learned from.
        originals: trained networks of the tasks that were generated for.
        generated: networks from the generator.
        judge: measures networks; None: only distances are measured.
        data_split: whose data networks are measured on, `validation` or `test`.
        task_name: names tasks.
        noise_levels: of noised originals.
        ridge_penalty: of the ridge baselines.
        seed: of the noise on noised originals.
    """
    heldout = [n for n in originals if n.split == TaskSplit.unseen]
    left_out: list[str] = []
    if training.conditions is None:
        trained_tasks = [task_name(None)] * len(training.values)
    else:
        trained_tasks = [task_name(condition) for condition in training.conditions]
    try:
        distances = weight_distances(
            torch.stack([flatten(layout, network.state_dict) for network in generated]),
            [task_name(network.condition) for network in generated],
            training.values,
            trained_tasks,
            torch.stack([flatten(layout, network.state_dict) for network in heldout]) if heldout else None,
        )
        nearest = dict(zip([n.name for n in heldout], distances.heldout.tolist(), strict=False))
        to_centre = dict(zip([n.name for n in heldout], distances.heldout_to_centre.tolist(), strict=False))
        of_generated = list(
            zip(distances.generated.tolist(), distances.generated_to_centre.tolist(), strict=True)
        )
        among = (distances.siblings.tolist(), distances.generated_siblings.tolist())
        scale = distances.scale
    except RPGError as error:
        left_out.append(f"distances: {error}")
        nearest, to_centre, of_generated, among = {}, {}, [(None, None)] * len(generated), ([], [])
        scale = 0.0
    noise = torch.Generator().manual_seed(seed)
    of_originals = _measurements(judge, originals, data_split)
    of_networks = _measurements(judge, generated, data_split)
    of_noised: dict[float, list[Measurement]] = {}
    noised_distances: dict[float, list[float]] = {}
    copies = evenly_spaced([n.name for n in originals if n.split == TaskSplit.seen], _MOST_COPIES)
    values: list[Tensor] = []
    for level in noise_levels:

        def noised(level: float = level) -> Iterator[Network]:
            for network in originals:
                state_dict = add_noise(network.state_dict, level, noise)
                if network.name in copies:
                    values.append(flatten(layout, state_dict))
                yield replace(network, state_dict=state_dict)

        of_noised[level] = _measurements(judge, noised(), data_split)
    if values and scale:
        # One pass over the training set serves all levels.
        near = nearest_checkpoint(torch.stack(values), training.values).distance / scale
        by_level = near.split(len(copies))
        noised_distances = {level: rows.tolist() for level, rows in zip(noise_levels, by_level, strict=True)}
    metric = metric_that_counts(judge, [*of_originals, *of_networks]) if judge else None
    if metric:
        of_originals = with_metric(metric, [n.name for n in originals], of_originals)
        of_networks = with_metric(metric, [n.name for n in generated], of_networks)

    def evaluated(
        networks: Sequence[Network],
        rows: Sequence[Measurement],
        distances: Sequence[tuple[float | None, float | None]],
        suffix: str = "",
    ) -> list[Evaluated]:
        return [
            Evaluated(
                name=network.name + suffix,
                task=task_name(network.condition),
                split=network.split,
                score=row.metrics.get(metric.name) if metric else None,
                wrong=row.wrong,
                condition=network.condition,
                distance=distance,
                centre_distance=centre_distance,
                metrics=row.metrics,
                failure=row.failure,
            )
            for network, row, (distance, centre_distance) in zip(networks, rows, distances, strict=True)
        ]

    unseen = {n.condition: n for n in generated if n.split == TaskSplit.unseen} or {
        n.condition: n for n in generated if n.condition is None
    }
    baselines: dict[str, dict[str, float]] = {}
    if judge and metric:
        baselines, reasons = _baselines(
            layout, training, list(unseen.values()), judge, metric, data_split, task_name, ridge_penalty
        )
        left_out += reasons
    left_out += [row.failure for row in (*of_originals, *of_networks) if row.failure is not None]
    return Measured(
        originals=evaluated(
            originals, of_originals, [(nearest.get(n.name), to_centre.get(n.name)) for n in originals]
        ),
        generated=evaluated(generated, of_networks, of_generated),
        noised={
            level: evaluated(originals, rows, [(None, None)] * len(rows), f" + {level:g}")
            for level, rows in of_noised.items()
        },
        baselines=baselines,
        sibling_distances=among[0],
        generated_distances=among[1],
        noised_distances=noised_distances,
        metric=metric,
        other_metrics=[each for each in judge.metrics if each != metric] if judge else [],
        left_out=left_out,
    )


def _measurements(judge: Judge | None, networks: Iterable[Network], data_split: str) -> list[Measurement]:
    """What networks are worth. Of networks that are made while this runs, few are in memory at a time."""
    rows: list[Measurement] = []
    some: list[Candidate] = []
    size = 0
    for network in networks:
        if judge is None:
            rows.append(Measurement({}))
            continue
        some.append(Candidate(network.name, network.state_dict, network.asked))
        size += sum(value.nbytes for value in network.state_dict.values())
        if size > _BYTES_AT_ONCE:
            rows += judge.measure(some, data_split)
            some, size = [], 0
    return rows + (judge.measure(some, data_split) if judge and some else [])


def _baselines(
    layout: Layout, training: TrainingSet, asked: Sequence[Network], judge: Judge, metric: Metric,
    data_split: str, task_name: TaskName, ridge_penalty: float,
) -> tuple[dict[str, dict[str, float]], list[str]]:  # fmt: skip
    """Each baseline's score by task, for the tasks of the networks `asked`; and why some are left out."""
    left_out: list[str] = []
    candidates: dict[str, Iterator[_Row]] = {}
    if training.conditions is not None and asked and asked[0].condition is not None:
        known = torch.tensor(training.conditions)
        wanted = torch.tensor([network.condition for network in asked])
        for order in RIDGE_ORDERS:
            candidates[f"ridge_{order}"] = _ridge_rows(training.values, known, asked, order, ridge_penalty)
        nearest = zip(asked, nearest_tasks(known, wanted), strict=True)
        candidates["nearest_task"] = (
            (network, training.values[row]) for network, rows in nearest for row in rows
        )
    if asked:
        mean = centre(training.values)
        candidates["centre"] = ((network, mean) for network in asked)
    baselines: dict[str, dict[str, float]] = {}
    for key, rows in candidates.items():
        try:
            # What is wrong with a baseline is seen at its first row.
            first = next(rows)
        except RPGError as error:
            left_out.append(str(error))
            continue
        tasks: list[str] = []
        found: dict[str, list[float]] = {}
        networks = _baseline_networks(key, chain([first], rows), layout, task_name, tasks)
        # The networks are made, and their tasks noted, while they are measured.
        measurements = _measurements(judge, networks, data_split)
        for task, each in zip(tasks, measurements, strict=True):
            if each.failure is not None:
                left_out.append(each.failure)
            if metric.name in each.metrics:
                found.setdefault(task, []).append(each.metrics[metric.name])
        if found:
            baselines[key] = {task: sum(values) / len(values) for task, values in found.items()}
    try:
        majority = {task_name(n.condition): judge.majority(n.asked, data_split) for n in asked}
    except RPGError as error:
        left_out.append(f"majority: {error}")
        majority = {}
    if metric.name == "accuracy" and (shares := {t: v for t, v in majority.items() if v is not None}):
        baselines["majority"] = shares
    return baselines, left_out


_Row = tuple[Network, Tensor]
"""The network whose task a baseline is for, and the baseline's values [P]."""


def _ridge_rows(
    values: Tensor, known: Tensor, asked: Sequence[Network], order: int, penalty: float
) -> Iterator[_Row]:
    """The networks that ridge regression predicts; about `_BYTES_AT_ONCE` of them are there at a time."""
    some = max(1, _BYTES_AT_ONCE // values[0].nbytes)
    for start in range(0, len(asked), some):
        part = asked[start : start + some]
        wanted = torch.tensor([network.condition for network in part])
        yield from zip(part, ridge(known, values, wanted, order, penalty), strict=True)


def _baseline_networks(
    key: str, rows: Iterable[_Row], layout: Layout, task_name: TaskName, tasks: list[str]
) -> Iterator[Network]:
    for network, values in rows:
        tasks.append(task_name(network.condition))
        yield replace(network, name=f"{key} for {tasks[-1]}", state_dict=unflatten(layout, values))
