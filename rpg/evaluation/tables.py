"""The report's scores as tables for the terminal and the model card, and the names of what is measured."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

BASELINES = {
    "best_original": "best original by validation",
    "ridge_3": "ridge regression, order 3",
    "ridge_2": "ridge regression, order 2",
    "ridge_1": "ridge regression, order 1",
    "nearest_task": "nearest training task",
    "centre": "mean checkpoint",
    "majority": "majority class",
}
"""Names of the known baselines, strongest kind first. Others are the references of a task family, which come
before these and are shown under their own name."""

DISTANCES = {
    "generated_unseen": "generated, unseen tasks",
    "generated_seen": "generated, seen tasks",
    "heldout_originals": "originals of unseen tasks",
    "training_siblings": "training checkpoints, to another of the same task",
    "among_generated": "generated, to another generated one of the same task",
    "generated_to_centre": "generated, to the mean checkpoint",
    "heldout_to_centre": "originals of unseen tasks, to the mean checkpoint",
}
"""Names of the distances in weight space, in the order of the tables; noised networks come after them."""


def terminal_table(report: Mapping[str, Any]) -> Table:
    """The scores, for a terminal; without any, the distances in weight space."""
    if report["metric"] is None:
        return _distance_table(report)
    table = Table(title=metric_title(report["metric"]), title_justify="left")
    table.add_column("networks", no_wrap=True)
    for heading in ("mean", "min", "max", "n"):
        table.add_column(heading, justify="right")
    for kind, name, row in score_rows(report):
        style = "bold" if kind == "generated" else "dim" if kind == "baseline" else ""
        table.add_row(name, *_cells(row), style=style)
    return table


def _distance_table(report: Mapping[str, Any]) -> Table:
    table = Table(title="Distance to the nearest training checkpoint", title_justify="left")
    table.add_column("networks", no_wrap=True)
    for heading in ("median", "min", "max", "n"):
        table.add_column(heading, justify="right")
    for key, name in distance_names(report).items():
        row = report["distance"][key]
        if row["n"]:
            cells = [number(row["median"]), number(row["min"]), number(row["max"]), str(row["n"])]
            table.add_row(name, *cells, style="bold" if key.startswith("generated") else "")
    return table


def model_card_table(report: Mapping[str, Any]) -> str:
    """The scores as a Markdown table and what they say of originals and generated networks, for the
    generator's README; empty if there are none."""
    if report["metric"] is None:
        return ""
    metric = report["metric"]["name"].replace("|", "\\|")
    lines = [f"| networks | mean {metric} | min | max | n |", "| --- | ---: | ---: | ---: | ---: |"]
    for kind, name, row in score_rows(report):
        mark = "**" if kind == "generated" else ""
        cells = _cells(row)
        safe = name.replace("|", "\\|")
        lines.append(f"| {mark}{safe}{mark} | {mark}{cells[0]}{mark} | {' | '.join(cells[1:])} |")
    if found := comparisons(report):
        lines += ["", *(f"- {line}" for line in found)]
    return "\n".join(lines) + "\n"


def comparisons(report: Mapping[str, Any]) -> list[str]:
    """Generated networks beside originals, in a line for each of: score, gain by voting, variety."""
    score, votes = report["score"], report["ensembles"]
    lines = []
    if score["ratio"] is not None:
        lines.append(f"generated / originals: {score['ratio']:.3f}")
    if votes is not None:
        gains = {key: votes[key]["gain"] for key in ("originals", "generated")}
        line = f"gain in accuracy by ensembles of {votes['size']}: "
        line += ", ".join(f"{key} {gain:+.4f}" for key, gain in gains.items())
        lines.append(line + (f" ({votes['gain_ratio']:.2f} ×)" if votes["gain_ratio"] is not None else ""))
    alike = report["similarity"].get(score["ratio_of"].removeprefix("generated_"), {})
    if alike.get("generated_minus_original") is not None:
        lines.append(
            f"similarity of wrong answers: originals {alike['original_original']:.2f}, "
            f"generated {alike['generated_generated']:.2f} ({alike['generated_minus_original']:+.2f})"
        )
    return lines


def baseline_name(key: str) -> str:
    """A baseline's key in words."""
    return BASELINES.get(key, key.replace("_", " "))


def score_rows(report: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(kind, name, statistics) of every line of the table of scores."""
    score = report["score"]
    where = "seen" if score["ratio_of"] == "generated_seen" else "unseen"
    # A collection without conditions is one task.
    of = {key: f", {key} tasks" if report["conditions"] else "" for key in ("seen", "unseen")}
    rows = [("original", f"originals{of[where]}", score["originals"])]
    rows.append(("generated", f"generated{of['unseen']}", score["generated_unseen"]))
    if where == "seen":
        rows.append(("generated", f"generated{of['seen']}", score["generated_seen"]))
    rows.append(("generated", "generated, BatchNorm recomputed", score["generated_batchnorm_recomputed"]))
    if score["ensembles"]:
        size = report["ensembles"]["size"]
        rows += [
            ("ensemble", f"ensemble of {size} {key}", score["ensembles"][key])
            for key in ("originals", "generated")
        ]
    rows += [("baseline", baseline_name(key), row) for key, row in score["baselines"].items()]
    if where == "unseen":
        rows.append(("original", f"originals{of['seen']}", score["originals_seen"]))
        rows.append(("generated", f"generated{of['seen']}", score["generated_seen"]))
    return [row for row in rows if row[2]["n"] or row[2].get("failed")]


def _cells(row: Mapping[str, Any]) -> list[str]:
    failed = f" ({row['failed']} failed)" if row.get("failed") else ""
    return [number(row["mean"]), number(row["min"]), number(row["max"]), f"{row['n']}{failed}"]


def metric_title(metric: Mapping[str, Any]) -> str:
    """What the table of scores is of."""
    name = "Accuracy" if metric["name"] == "accuracy" else metric["name"]
    unit = f" [{metric['unit']}]" if metric["unit"] else ""
    return f"{name}{unit} on held-out data" + ("" if metric["higher_is_better"] else " (lower is better)")


def distance_names(report: Mapping[str, Any]) -> dict[str, str]:
    """What each row of distances is called, in the order of the tables."""
    levels = [key for key in report["distance"] if key.startswith("noised_")]
    noised = {key: f"a training checkpoint with noise {key.removeprefix('noised_')}" for key in levels}
    return {**DISTANCES, **noised}


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    if value is None:
        return "–"
    # Losses and such may be so small or large that three decimals say nothing.
    plain = value == 0 or 0.01 <= abs(value) < 10_000
    return f"{value:.{digits}f}" if plain else f"{value:.{digits}g}"
