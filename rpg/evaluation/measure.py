"""Measuring generated networks against originals, baselines and the training set.

Distances in weight space need the weights alone. What networks are worth is measured by a judge, where there
is one."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.errors import RPGError
from rpg.evaluation.baseline_scores import (
    BestOriginals,
    Scorer,
    best_original,
    majority,
    predicted_weights,
    references,
)
from rpg.evaluation.baselines import evenly_spaced
from rpg.evaluation.distance import nearest_checkpoint, weight_distances
from rpg.evaluation.judge import (
    Candidate,
    FamilyJudge,
    Judge,
    Measurement,
    metric_that_counts,
    with_metric,
)
from rpg.evaluation.networks import Network, TaskName, TrainingSet, flatten, measurements
from rpg.evaluation.results import Evaluated, TaskSplit
from rpg.evaluation.similarity import add_noise
from rpg.seeds import derived_seed
from rpg.tasks.families import Metric

_MOST_COPIES = 20
"""Noised training checkpoints whose distance to the training set is measured, for each level."""
_MOST_RECOMPUTED = 40
"""Generated networks whose BatchNorm statistics are recomputed, each from thousands of training inputs."""


@dataclass(frozen=True)
class Measured:
    """The fields of `Results` that come from networks."""

    originals: list[Evaluated]
    generated: list[Evaluated]
    recomputed: list[Evaluated]
    noised: dict[float, list[Evaluated]]
    baselines: dict[str, dict[str, float]]
    sibling_distances: list[float]
    generated_distances: list[float]
    noised_distances: dict[float, list[float]]
    metric: Metric | None
    other_metrics: list[Metric]
    left_out: list[str]


def measure(
    layout: Layout, training: TrainingSet, originals: Sequence[Network], generated: Sequence[Network],
    judge: Judge | None, data_split: str, task_name: TaskName,
    noise_levels: Sequence[float], ridge_penalty: float, seed: int,
    best_originals: BestOriginals | None = None, read_backbone: Callable[[], dict[str, Tensor]] | None = None,
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
        seed: of the noise on noised originals, and of the data that BatchNorm's statistics are recomputed on.
        best_originals: of the unseen tasks, or of a collection without conditions.
        read_backbone: reads the backbone that a task family's references are made from; it raises an
            `RPGError` if there is none.
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
    of_originals = measurements(judge, originals, data_split)
    of_networks = measurements(judge, generated, data_split)
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

        rows = measurements(judge, noised(), data_split)
        # Noised networks never vote, and there may be many of them.
        of_noised[level] = [replace(row, answers=None) for row in rows]
    if values and scale:
        # One pass over the training set serves all levels.
        near = nearest_checkpoint(torch.stack(values), training.values).distance / scale
        by_level = near.split(len(copies))
        noised_distances = {level: rows.tolist() for level, rows in zip(noise_levels, by_level, strict=True)}
    metric = metric_that_counts(judge, [*of_originals, *of_networks]) if judge else None
    recomputed: list[Network] = []
    of_recomputed: list[Measurement] = []
    baselines: dict[str, dict[str, float]] = {}
    if judge and metric:
        of_originals = with_metric(metric, [n.name for n in originals], of_originals)
        of_networks = with_metric(metric, [n.name for n in generated], of_networks)
        subjects = [n for n in generated if n.split == TaskSplit.unseen]
        subjects = subjects or [n for n in generated if n.condition is None]
        scorer = Scorer(judge, metric, data_split, task_name)
        asked = list({n.condition: n for n in subjects}.values())
        baselines = predicted_weights(scorer, layout, training, asked, ridge_penalty)
        if best_originals is not None:
            known = dict(zip([n.name for n in originals], of_originals, strict=True))
            baselines |= best_original(scorer, best_originals, known)
        baselines |= majority(scorer, asked)
        if read_backbone is not None:
            baselines |= references(scorer, read_backbone, asked, [*baselines])
        left_out += scorer.left_out
        recomputed, reasons = _with_batchnorm_recomputed(
            judge, evenly_spaced(subjects, _MOST_RECOMPUTED), seed
        )
        left_out += reasons
        of_recomputed = measurements(judge, recomputed, data_split)
        of_recomputed = with_metric(metric, [n.name for n in recomputed], of_recomputed)

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
                answers=row.answers,
            )
            for network, row, (distance, centre_distance) in zip(networks, rows, distances, strict=True)
        ]

    everything = (*of_originals, *of_networks, *of_recomputed)
    left_out += [row.failure for row in everything if row.failure is not None]
    return Measured(
        originals=evaluated(
            originals, of_originals, [(nearest.get(n.name), to_centre.get(n.name)) for n in originals]
        ),
        generated=evaluated(generated, of_networks, of_generated),
        recomputed=evaluated(recomputed, of_recomputed, [(None, None)] * len(recomputed)),
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


def _with_batchnorm_recomputed(
    judge: Judge, networks: Sequence[Network], seed: int
) -> tuple[list[Network], list[str]]:
    """The networks with BatchNorm's statistics of training data, and why some or all are left out."""
    if not isinstance(judge, FamilyJudge) or not networks:
        return [], []
    try:
        if not judge.can_recompute_batchnorm:
            return [], []
        candidates = [Candidate(n.name, n.state_dict, n.asked) for n in networks]
        done, left_out = judge.with_batchnorm_recomputed(candidates, derived_seed(seed, "BatchNorm", 0))
    except RPGError as error:
        return [], [f"BatchNorm recomputed: {error}"]
    by_name = {network.name: network for network in networks}
    suffix = " with BatchNorm recomputed"
    return [
        replace(by_name[each.name], name=each.name + suffix, state_dict=each.state_dict) for each in done
    ], left_out
