"""Scores by task of all that generated networks are compared with besides the originals' mean.

They are networks of weights predicted from the training checkpoints, the best original, what networks answer
that were not trained for the task, and always giving the most frequent answer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor

from rpg.collection.collection import Entry
from rpg.collection.layout import Layout
from rpg.errors import RPGError
from rpg.evaluation.baselines import centre, nearest_tasks, ridge
from rpg.evaluation.judge import ACCURACY, FamilyJudge, Judge, Measurement
from rpg.evaluation.networks import (
    BYTES_AT_ONCE,
    Condition,
    Network,
    TaskName,
    TrainingSet,
    measurements,
    unflatten,
)
from rpg.tasks.families import Metric

RIDGE_ORDERS = (1, 2, 3)

Scores = dict[str, dict[str, float]]
"""Score by baseline, then by task."""
BestOriginals = Callable[[Metric], Sequence[Network]]
"""Gives the original of each task that is best by a metric on validation data.

Raises an `RPGError` if that was not recorded."""


@dataclass(frozen=True)
class Scorer:
    """Scores networks by the metric that counts."""

    judge: Judge
    metric: Metric
    data_split: str
    """Whose data networks are measured on, `validation` or `test`."""
    task_name: TaskName
    left_out: list[str] = field(default_factory=list)
    """Why something has no score, a line for each reason."""

    def scores(self, networks: Iterable[Network]) -> list[float | None]:
        """The score of each network; None for one that could not be measured."""
        found = measurements(self.judge, networks, self.data_split)
        self.left_out.extend(each.failure for each in found if each.failure is not None)
        return [each.metrics.get(self.metric.name) for each in found]


def predicted_weights(
    scorer: Scorer, layout: Layout, training: TrainingSet, asked: Sequence[Network], ridge_penalty: float
) -> Scores:
    """Networks predicted from the training checkpoints: ridge regression, the nearest task, the centre.

    Args:
        scorer: scores networks.
        layout: of the collection.
        training: what the generator learned from.
        asked: one network of each task.
        ridge_penalty: of the ridge regressions.
    """
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
    found: Scores = {}
    for key, rows in candidates.items():
        try:
            # What is wrong with a baseline is seen at its first row.
            first = next(rows)
        except RPGError as error:
            scorer.left_out.append(str(error))
            continue
        tasks: list[str] = []
        networks = _predicted_networks(key, chain([first], rows), layout, scorer.task_name, tasks)
        # The networks are made, and their tasks noted, while they are measured.
        scores = scorer.scores(networks)
        by_task: dict[str, list[float]] = {}
        for task, score in zip(tasks, scores, strict=True):
            if score is not None:
                by_task.setdefault(task, []).append(score)
        if by_task:
            found[key] = {task: sum(values) / len(values) for task, values in by_task.items()}
    return found


_Row = tuple[Network, Tensor]
"""The network whose task a baseline is for, and the baseline's values [P]."""


def _ridge_rows(
    values: Tensor, known: Tensor, asked: Sequence[Network], order: int, penalty: float
) -> Iterator[_Row]:
    """The networks that ridge regression predicts; about `BYTES_AT_ONCE` of them are there at a time."""
    some = max(1, BYTES_AT_ONCE // values[0].nbytes)
    for start in range(0, len(asked), some):
        part = asked[start : start + some]
        wanted = torch.tensor([network.condition for network in part])
        yield from zip(part, ridge(known, values, wanted, order, penalty), strict=True)


def _predicted_networks(
    key: str, rows: Iterable[_Row], layout: Layout, task_name: TaskName, tasks: list[str]
) -> Iterator[Network]:
    for network, values in rows:
        tasks.append(task_name(network.condition))
        yield replace(network, name=f"{key} for {tasks[-1]}", state_dict=unflatten(layout, values))


def best_original(scorer: Scorer, best: BestOriginals, measured: Mapping[str, Measurement]) -> Scores:
    """The one original of each task that a user would choose.

    Args:
        scorer: scores networks.
        best: gives them.
        measured: originals that were measured already, by name.
    """
    if scorer.data_split == "validation":
        scorer.left_out.append("best original: it is chosen by the validation data, which the report is of")
        return {}
    try:
        networks = best(scorer.metric)
    except RPGError as error:
        scorer.left_out.append(f"best original: {error}")
        return {}
    others = [n for n in networks if n.name not in measured]
    scores = {name: each.metrics.get(scorer.metric.name) for name, each in measured.items()}
    scores |= dict(zip([n.name for n in others], scorer.scores(others), strict=True))
    known = {scorer.task_name(n.condition): scores[n.name] for n in networks}
    by_task = {task: score for task, score in known.items() if score is not None}
    return {"best_original": by_task} if by_task else {}


def best_by_validation(entries: Sequence[Entry], metric: Metric) -> list[Entry]:
    """The checkpoint of each task whose recorded value of the metric on validation data is best.

    Args:
        entries: checkpoints of a collection, whose `metrics` have it as `validation_NAME`.
        metric: that counts.

    Returns:
        The first of the best of each task; tasks without a recorded value are left out.

    Raises:
        RPGError: if other metrics are recorded alone.
    """
    key = f"validation_{metric.name}"
    sign = 1 if metric.higher_is_better else -1
    best: dict[Condition | None, Entry] = {}
    for entry in entries:
        if key not in entry.metrics:
            continue
        condition = None if entry.condition is None else tuple(entry.condition)
        if condition not in best or sign * (entry.metrics[key] - best[condition].metrics[key]) > 0:
            best[condition] = entry
    recorded = dict.fromkeys(name for entry in entries for name in entry.metrics)
    if recorded and not best:
        raise RPGError(f"no checkpoint has a metric '{key}'; recorded are {', '.join(recorded):.80}")
    return list(best.values())


def majority(scorer: Scorer, asked: Sequence[Network]) -> Scores:
    """Accuracy of always giving the most frequent right answer, where scores are accuracies.

    Args:
        scorer: scores networks.
        asked: one network of each task.
    """
    try:
        shares = {
            scorer.task_name(n.condition): scorer.judge.majority(n.asked, scorer.data_split) for n in asked
        }
    except RPGError as error:
        scorer.left_out.append(f"majority: {error}")
        return {}
    by_task = {task: share for task, share in shares.items() if share is not None}
    return {"majority": by_task} if by_task and scorer.metric.name == ACCURACY.name else {}


def references(
    scorer: Scorer,
    read_backbone: Callable[[], dict[str, Tensor]],
    asked: Sequence[Network],
    taken: Sequence[str],
) -> Scores:
    """Accuracy of networks that were not trained for the tasks, where a family has some.

    Args:
        scorer: scores networks.
        read_backbone: reads the network that the collection's were fine-tuned from; it raises an `RPGError`
            if there is none.
        asked: one network of each task.
        taken: names of other baselines.
    """
    if not isinstance(scorer.judge, FamilyJudge) or not scorer.judge.has_references:
        return {}
    found: Scores = {}
    try:
        if scorer.metric.name != ACCURACY.name:
            raise RPGError(f"they have an accuracy, and the report is about {scorer.metric.name}")
        backbone = read_backbone()
        for network in asked:
            scores = scorer.judge.references(backbone, network.asked, scorer.data_split)
            if same := sorted(set(scores) & set(taken)):
                raise RPGError(f"{scorer.judge.name}: references: '{same[0]}' is the name of a baseline")
            for name, score in scores.items():
                found.setdefault(name, {})[scorer.task_name(network.condition)] = score
    except RPGError as error:
        scorer.left_out.append(f"references: {error}")
        return {}
    return found
