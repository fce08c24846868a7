"""The report of a run: `report.json` and `report.html`."""

import base64
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from rpg.evaluation.ensembles import LEAST_NETWORKS, Ensembles, Vote, ensembles
from rpg.evaluation.figures import (
    DARK,
    LIGHT,
    Points,
    TaskRow,
    Theme,
    distance_histogram,
    loss_curve,
    score_per_task,
    similarity_scatter,
)
from rpg.evaluation.judge import ACCURACY
from rpg.evaluation.results import (
    Evaluated,
    Results,
    TaskSplit,
    check_results,
    condition_label,
    of_split,
    predictions,
)
from rpg.evaluation.similarity import FloatArray, Similarity, similarity
from rpg.evaluation.tables import (
    BASELINES,
    baseline_name,
    comparisons,
    distance_names,
    metric_title,
    number,
    score_rows,
)
from rpg.storage.files import write_json, write_text
from rpg.storage.locations import AnyPath

STAGES = ("collect", "shard", "train", "refine", "generate", "evaluate")

FIGURES = {
    "similarity": (
        "Similarity and score",
        "Every network at its largest similarity to an original of its task; noised: originals with noise "
        "added. New networks as good as the originals lie at their height, copies at the right edge.",
    ),
    "tasks": (
        "Score per task",
        "Each unseen task: trained originals, generated networks with their range, and the baselines.",
    ),
    "distances": (
        "Distance to the nearest training checkpoint",
        "In normalised weights. A memorising generator would pile up at 0, left of the distances that "
        "training checkpoints of the same task keep from each other.",
    ),
    "loss": ("Training loss", "As logged, and smoothed over a twentieth of the run."),
}
"""Title and caption of each figure, in the order of the page."""


def build_report(results: Results) -> dict[str, Any]:
    """Everything that `report.json` holds, as plain JSON values; what was not measured is null or left out.

    `score` is about the metric that counts, `metric` names it, and `metrics` has the others.
    `score.originals` are those of the unseen tasks, which `score.ratio` compares with; a run without unseen
    tasks takes the seen ones for both, and for `ensembles`. `left_out` says why something is missing.

    Raises:
        RPGError: naming the network whose score or predictions make no sense.
    """
    check_results(results)
    unseen = bool(of_split(results.generated, TaskSplit.unseen))
    subject = TaskSplit.unseen if unseen else TaskSplit.seen
    originals = _scores(of_split(results.originals, subject))
    subjects = _scores(of_split(results.generated, subject))
    votes = ensembles(of_split(results.originals, subject), of_split(results.generated, subject))
    report = {
        "name": results.name,
        "seed": results.seed,
        "metric": dataclasses.asdict(results.metric) if results.metric else None,
        "score": {
            "originals": _score_statistics(of_split(results.originals, subject)),
            "originals_seen": _score_statistics(of_split(results.originals, TaskSplit.seen)),
            "generated_unseen": _score_statistics(of_split(results.generated, TaskSplit.unseen)),
            "generated_seen": _score_statistics(of_split(results.generated, TaskSplit.seen)),
            "generated_batchnorm_recomputed": _score_statistics(results.recomputed),
            "ensembles": _vote_statistics(votes) if results.metric == ACCURACY else None,
            "ratio": float(np.mean(subjects) / np.mean(originals))
            if subjects and originals and np.mean(originals) > 0
            else None,
            "ratio_of": f"generated_{subject}",
            "baselines": {
                key: _statistics(list(results.baselines[key].values())) for key in _ordered(results.baselines)
            },
        },
        "metrics": _other_metrics(results, subject),
        "ensembles": _ensembles_json(votes),
        "similarity": {
            str(split): _similarity_json(results, split)
            for split in (TaskSplit.unseen, TaskSplit.seen)
            if predictions(of_split(results.generated, split)).tasks
        },
        "distance": _distance_json(results),
        "per_task": _per_task(results),
        "timing_seconds": {
            **{stage: results.timing_seconds[stage] for stage in STAGES if stage in results.timing_seconds},
            **results.timing_seconds,
        },
        "conditions": any(network.condition is not None for network in results.generated),
        "left_out": [*results.left_out, *_too_few_to_vote(results.generated, votes)],
        "config": results.config,
        "versions": results.versions,
    }
    plain: dict[str, Any] = _plain(report)
    plain["summary"] = _summary(plain)
    return plain


def build_figures(results: Results, theme: Theme = LIGHT) -> dict[str, Figure]:
    """The figures that the results allow, by the keys of `FIGURES`."""
    check_results(results)
    figures = {}
    split = TaskSplit.unseen if of_split(results.generated, TaskSplit.unseen) else TaskSplit.seen
    networks, originals = of_split(results.generated, split), of_split(results.originals, split)
    if predictions(networks).tasks and predictions(originals).tasks:
        noised = {level: of_split(group, split) for level, group in results.noised.items()}
        measured = _similarity(results, split)
        figures["similarity"] = similarity_scatter(
            _points(measured.maxima_originals, originals),
            _points(measured.maxima_generated, networks),
            {
                level: _points(measured.maxima_noised[level], noised[level])
                for level in measured.maxima_noised
            },
            results.metric.name if results.metric else "score",
            theme,
        )
    rows = [row for row in _per_task(results) if row["split"] == split]
    if len(rows) > 1 and results.metric and any(row["generated"]["n"] for row in rows):
        figures["tasks"] = score_per_task(
            [
                TaskRow(
                    label=f"{row['task']} {condition_label(row['condition'])}".strip(),
                    originals=_scores([n for n in originals if n.task == row["task"]]),
                    generated=_scores([n for n in networks if n.task == row["task"]]),
                    baselines=row["baselines"],
                )
                for row in rows
            ],
            {key: baseline_name(key) for key in _ordered(results.baselines)},
            results.metric,
            theme,
        )
    distances = _distances(results)
    if distances["unseen"] or distances["seen"]:
        figures["distances"] = distance_histogram(distances, theme)
    if results.losses:
        figures["loss"] = loss_curve(results.losses, theme)
    return figures


def write_report(
    directory: AnyPath, report: Mapping[str, Any], figures: Mapping[str, tuple[bytes, bytes]]
) -> None:
    """Write `report.json` and `report.html`, each as a whole or not at all.

    Args:
        directory: where to; made if missing.
        report: from `build_report`.
        figures: SVG in the light and in the dark theme, by the keys of `FIGURES` (`figure_pairs`).

    Raises:
        RPGError: naming the file, if it cannot be written.
    """
    write_json(directory / "report.json", report)
    write_text(directory / "report.html", render_html(report, figures))


def figure_pairs(results: Results, convert: Callable[[Figure], bytes]) -> dict[str, tuple[bytes, bytes]]:
    """Every figure in the light and the dark theme, through `to_svg` (for the page) or `to_png`."""
    light, dark = build_figures(results, LIGHT), build_figures(results, DARK)
    return {key: (convert(light[key]), convert(dark[key])) for key in light}


def render_html(report: Mapping[str, Any], figures: Mapping[str, tuple[bytes, bytes]]) -> str:
    """The page: self-contained, without scripts; everything from the report is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["seconds"] = _seconds
    return environment.get_template("report.html").render(
        report=report,
        scores=score_rows(report),
        comparisons=comparisons(report),
        baseline_names={key: baseline_name(key) for key in report["score"]["baselines"]},
        figures=[
            (title, caption, *(base64.b64encode(image).decode() for image in figures[key]))
            for key, (title, caption) in FIGURES.items()
            if key in figures
        ],
        condition_label=condition_label,
        title=metric_title(report["metric"]) if report["metric"] else "Score",
        distance_names=distance_names(report),
        noise_levels=_noise_levels(report["similarity"]),
        config=json.dumps(report["config"], indent=2, ensure_ascii=False),
    )


def _ordered(baselines: Mapping[str, Any]) -> list[str]:
    return sorted(set(baselines) - set(BASELINES)) + [key for key in BASELINES if key in baselines]


def _other_metrics(results: Results, subject: TaskSplit) -> dict[str, Any]:
    """Statistics of all metrics but the one that counts, of the tasks that the report is about."""
    known = {metric.name: metric for metric in results.other_metrics}
    originals = of_split(results.originals, subject)
    generated = of_split(results.generated, subject)
    names = dict.fromkeys(name for network in (*originals, *generated) for name in network.metrics)
    return {
        name: {
            "higher_is_better": known[name].higher_is_better if name in known else None,
            "unit": known[name].unit if name in known else "",
            "originals": _statistics([n.metrics[name] for n in originals if name in n.metrics]),
            "generated": _statistics([n.metrics[name] for n in generated if name in n.metrics]),
        }
        for name in names
        if results.metric is None or name != results.metric.name
    }


def _scores(networks: Sequence[Evaluated]) -> list[float]:
    return [network.score for network in networks if network.score is not None]


def _score_statistics(networks: Sequence[Evaluated]) -> dict[str, Any]:
    """Statistics of the scores, and the number of networks that could not be measured."""
    return {
        **_statistics(_scores(networks)),
        "failed": sum(network.failure is not None for network in networks),
    }


def _vote_statistics(votes: Ensembles | None) -> dict[str, Any] | None:
    """Statistics of the ensembles' accuracies over tasks."""
    if votes is None:
        return None
    return {
        "originals": _statistics([vote.accuracy for vote in votes.originals.values()]),
        "generated": _statistics([vote.accuracy for vote in votes.generated.values()]),
    }


def _too_few_to_vote(generated: Sequence[Evaluated], votes: Ensembles | None) -> list[str]:
    """Why there are no ensembles, if answers were looked at."""
    if votes is not None or all(network.answers is None for network in generated):
        return []
    return [f"ensembles: no task has {LEAST_NETWORKS} originals and {LEAST_NETWORKS} generated networks"]


def _ensembles_json(votes: Ensembles | None) -> dict[str, Any] | None:
    """Means over tasks. `gain` is the accuracy of the ensemble minus the mean accuracy of its members, and
    `gain_ratio` the gain of generated networks in that of originals, if the latter is positive."""
    if votes is None:
        return None

    def means(by_task: Mapping[str, Vote]) -> dict[str, float]:
        accuracy, members = np.mean(list(by_task.values()), axis=0).tolist()
        return {"accuracy": accuracy, "members": members, "gain": accuracy - members}

    originals, generated = means(votes.originals), means(votes.generated)
    return {
        "size": votes.size,
        "tasks": len(votes.originals),
        "originals": originals,
        "generated": generated,
        "gain_ratio": generated["gain"] / originals["gain"] if originals["gain"] > 0 else None,
    }


def _points(similarities: FloatArray, networks: Sequence[Evaluated]) -> Points:
    """The networks whose predictions were looked at, which the similarities are of."""
    scores = [math.nan if n.score is None else n.score for n in networks if n.wrong is not None]
    return Points(similarities, np.array(scores, dtype=np.float64))


def _similarity(results: Results, split: TaskSplit) -> Similarity:
    noised = {level: predictions(of_split(group, split)) for level, group in results.noised.items()}
    return similarity(
        predictions(of_split(results.generated, split)),
        predictions(of_split(results.originals, split)),
        {level: group for level, group in noised.items() if group.tasks},
    )


def _similarity_json(results: Results, split: TaskSplit) -> dict[str, Any]:
    measured = _similarity(results, split)
    scores = {
        f"{level:g}": _statistics(_scores(of_split(group, split)))["mean"]
        for level, group in results.noised.items()
    }
    return {
        "generated_original": measured.generated_original,
        "generated_original_max": measured.generated_original_max,
        "generated_generated": measured.generated_generated,
        "original_original": measured.original_original,
        "original_original_max": measured.original_original_max,
        "generated_minus_original": None
        if measured.generated_generated is None or measured.original_original is None
        else measured.generated_generated - measured.original_original,
        "noised_original_max": {f"{level:g}": value for level, value in measured.noised_original_max.items()},
        "noised_score": {f"{level:g}": scores[f"{level:g}"] for level in measured.noised_original_max},
    }


def _distances(results: Results) -> dict[str, list[float]]:
    def known(networks: Sequence[Evaluated]) -> list[float]:
        return _finite([network.distance for network in networks])

    return {
        "siblings": [float(distance) for distance in results.sibling_distances],
        "heldout": known(of_split(results.originals, TaskSplit.unseen)),
        "unseen": known(of_split(results.generated, TaskSplit.unseen)),
        "seen": known(of_split(results.generated, TaskSplit.seen)),
    }


def _finite(distances: Sequence[float | None]) -> list[float]:
    return [float(distance) for distance in distances if distance is not None and math.isfinite(distance)]


def _distance_json(results: Results) -> dict[str, Any]:
    """Statistics of distances; `closer_than_siblings` counts networks nearer than any two siblings are."""
    distances = _distances(results)
    closest = min(distances["siblings"], default=0.0)
    return {
        **{
            f"generated_{split}": {
                **_statistics(distances[split]),
                "closer_than_siblings": sum(distance < closest for distance in distances[split]),
            }
            for split in TaskSplit
        },
        "heldout_originals": _statistics(distances["heldout"]),
        "training_siblings": _statistics(distances["siblings"]),
        "among_generated": _statistics(list(results.generated_distances)),
        "generated_to_centre": _statistics(_finite([n.centre_distance for n in results.generated])),
        "heldout_to_centre": _statistics(
            _finite([n.centre_distance for n in of_split(results.originals, TaskSplit.unseen)])
        ),
        **{
            f"noised_{level:g}": _statistics(_finite(distances))
            for level, distances in sorted(results.noised_distances.items())
        },
    }


def _per_task(results: Results) -> list[dict[str, Any]]:
    """A row for every task that was generated for, unseen first, in the order of the results."""
    rows = []
    for split in (TaskSplit.unseen, TaskSplit.seen):
        generated, originals = of_split(results.generated, split), of_split(results.originals, split)
        for task in dict.fromkeys(network.task for network in generated):
            members = [network for network in generated if network.task == task]
            rows.append(
                {
                    "task": task,
                    "condition": members[0].condition,
                    "split": str(split),
                    "originals": _score_statistics([n for n in originals if n.task == task]),
                    "generated": _score_statistics(members),
                    "baselines": {
                        key: results.baselines[key][task]
                        for key in _ordered(results.baselines)
                        if task in results.baselines[key]
                    },
                }
            )
    return rows


def _noise_levels(by_split: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(level for row in by_split.values() for level in row["noised_original_max"]))


def _statistics(values: Sequence[float]) -> dict[str, Any]:
    if not values:
        return {"mean": None, "median": None, "min": None, "max": None, "std": None, "n": 0}
    array = np.asarray(values, dtype=np.float64)
    return {
        "mean": float(array.mean()),
        "median": float(np.median(array)),
        "min": float(array.min()),
        "max": float(array.max()),
        "std": float(array.std()),
        "n": len(array),
    }


def _summary(report: Mapping[str, Any]) -> list[str]:
    """The result in sentences: the score reached, and whether networks are copies."""
    score, metric = report["score"], report["metric"]
    split = score["ratio_of"].removeprefix("generated_")
    generated, originals = score[score["ratio_of"]], score["originals"]
    sentences = []
    if generated["n"] and metric:
        tasks = sum(1 for row in report["per_task"] if row["split"] == split)
        sentence = _counted(generated["n"], "network") + " generated"
        if report["conditions"]:
            sentence += f" for {_counted(tasks, f'{split} task')}"
        sentence += f" {'reach' if generated['n'] > 1 else 'reaches'} a mean {metric['name']} of "
        sentence += number(generated["mean"])
        if score["ratio"] is not None:
            sentence += f", {score['ratio']:.1%} of the {number(originals['mean'])} of trained originals"
        sentences.append(sentence + ("." if metric["higher_is_better"] else " (lower is better)."))
    known = {key: row["mean"] for key, row in score["baselines"].items() if row["mean"] is not None}
    if known and metric:
        best = (max if metric["higher_is_better"] else min)(known, key=lambda key: known[key])
        sentences.append(f"The strongest baseline, {baseline_name(best)}, reaches {number(known[best])}.")
    near, siblings = report["distance"][f"generated_{split}"], report["distance"]["training_siblings"]
    if near["n"] and siblings["n"]:
        comparison = "farther than" if near["median"] > siblings["median"] else "no farther than"
        closer = near["closer_than_siblings"]
        sentences.append(
            f"The median generated network is {near['median']:.2f} from the nearest training checkpoint, "
            f"{comparison} training checkpoints of one task are from each other ({siblings['median']:.2f}); "
            f"{closer or 'none'} of {near['n']} {'are' if closer > 1 else 'is'} closer than any two of those."
        )
    return sentences


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number:,} {noun}s"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    minutes, seconds = divmod(round(value), 60)
    return f"{value:.1f} s" if value < 59.5 else f"{minutes} min {seconds:02d} s"


def _plain(value: Any) -> Any:
    """Plain JSON values: NumPy scalars and tuples converted, NaN and infinities as null, keys as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    return str(value)
