"""Scores by task of all that generated networks are compared with besides the originals' mean.

They are networks of weights predicted from the training checkpoints, the best original, what networks answer
that were not trained for the task, and always giving the most frequent answer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rpg.collection.collection import Entry
from rpg.collection.layout import Layout
from rpg.errors import RPGError
from rpg.evaluation.baselines import centre, nearest_tasks, ridge
from rpg.evaluation.judge import ACCURACY, Candidate, FamilyJudge, Judge, Measurement
from rpg.evaluation.networks import Condition, Network, StateDict, TaskName, TrainingSet, unflatten
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

    def scores(self, networks: Sequence[Candidate]) -> list[float | None]:
        """The score of each network; None for one that could not be measured."""
        found = self.judge.measure(networks, self.data_split)
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
    candidates: dict[str, list[list[Tensor]]] = {}
    if training.conditions is not None and asked and asked[0].condition is not None:
        known = torch.tensor(training.conditions)
        wanted = torch.tensor([network.condition for network in asked])
        for order in RIDGE_ORDERS:
            try:
                predicted = ridge(known, training.values, wanted, order, ridge_penalty)
                candidates[f"ridge_{order}"] = [[row] for row in predicted]
            except RPGError as error:
                scorer.left_out.append(str(error))
        candidates["nearest_task"] = [
            [training.values[row] for row in rows] for rows in nearest_tasks(known, wanted)
        ]
    if asked:
        mean = centre(training.values)
        candidates["centre"] = [[mean] for _ in asked]
    tasks = [scorer.task_name(network.condition) for network in asked]
    found: Scores = {}
    for key, rows_of_tasks in candidates.items():
        networks = [
            Candidate(f"{key} for {task}", unflatten(layout, row), network.asked)
            for task, network, rows in zip(tasks, asked, rows_of_tasks, strict=True)
            for row in rows
        ]
        scores = iter(scorer.scores(networks))
        by_task: dict[str, float] = {}
        for task, rows in zip(tasks, rows_of_tasks, strict=True):
            values = [score for score in [next(scores) for _ in rows] if score is not None]
            if values:
                by_task[task] = sum(values) / len(values)
        if by_task:
            found[key] = by_task
    return found


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
    candidates = [Candidate(n.name, n.state_dict, n.asked) for n in others]
    scores |= dict(zip([n.name for n in others], scorer.scores(candidates), strict=True))
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
    scorer: Scorer, read_backbone: Callable[[], StateDict], asked: Sequence[Network], taken: Sequence[str]
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
