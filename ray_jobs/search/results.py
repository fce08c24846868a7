"""The results of a search: the ranked table, the figure and the best config."""

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from rich.table import Table

from ray_jobs.search.space import Point
from ray_jobs.search.trial import Trial
from rpg.config import Config, save_config
from rpg.storage.files import replacing_file, write_json
from rpg.storage.locations import AnyPath

TABLE_FILE = "table.json"
BEST_FILE = "best.yaml"
FIGURE_NAME = "search"


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended."""

    trial: Trial
    score: float | None
    """Of networks generated for the validation tasks, when last validated; None for a trial that failed."""
    share: float
    """Share of the trial's budget that was spent, 0…1."""
    seconds: float
    """Seconds of training."""
    failure: str | None
    """Why it failed, or why networks could not be measured after the score."""


def ranked(results: list[TrialResult], higher_is_better: bool = True) -> list[TrialResult]:
    """Trials in order: those that got further come first, among them the better ones; failed ones last."""

    def key(result: TrialResult) -> tuple[bool, float, float]:
        if result.score is None:
            return (True, 0.0, 0.0)
        return (False, -result.share, -result.score if higher_is_better else result.score)

    return sorted(results, key=key)


def describe(point: Point) -> str:
    """A point in a few words: the last parts of its keys, and its values."""
    if not point:
        return "the config itself"
    return ", ".join(f"{_label(key)} {_text(value)}" for key, value in point.items())


def results_table(results: list[TrialResult], searched: list[str]) -> Table:
    """The ranked trials for the terminal."""
    table = Table(title="Generated networks on validation tasks, at equal compute", title_justify="left")
    table.add_column("trial", no_wrap=True)
    for name in ("score", "budget", "seconds", "parameters", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    for key in searched:
        table.add_column(_label(key), justify="right")
    for result in results:
        trial = result.trial
        score = "failed" if result.score is None else f"{result.score:.4f}"
        table.add_row(
            trial.name if trial.point else f"{trial.name} (config)",
            score,
            f"{result.share:.0%}",
            f"{result.seconds:.0f}",
            f"{trial.parameters / 1e6:.2f} M",
            _steps(trial),
            *(_text(attrgetter(key)(trial.config)) for key in searched),
        )
    return table


def failures(results: list[TrialResult]) -> list[str]:
    """What went wrong, a line for each trial with a failure."""
    return [f"trial {result.trial.name}: {result.failure}" for result in results if result.failure]


def write_results(
    directory: AnyPath,
    results: list[TrialResult],
    searched: list[str],
    best: Config,
    higher_is_better: bool,
) -> None:
    """Write `table.json`, the figure as SVG and PNG, and `best.yaml` into `directory`."""
    # Ray's workers import this module too, and Matplotlib takes a while to import.
    from rpg.evaluation.figures import to_png, to_svg
    from rpg.evaluation.search_figure import Tried, search_figure

    tried = [
        Tried(r.trial.name, r.score, r.trial.parameters, r.seconds, math.isclose(r.share, 1))
        for r in results
        if r.score is not None
    ]
    base = next(result.trial.name for result in results if not result.trial.point)
    figure = search_figure(tried, base, higher_is_better)
    for suffix, content in ((".svg", to_svg(figure)), (".png", to_png(figure))):
        with replacing_file(directory / f"{FIGURE_NAME}{suffix}") as temporary:
            temporary.write_bytes(content)
    with replacing_file(directory / BEST_FILE) as temporary:
        save_config(best, temporary)
    write_json(directory / TABLE_FILE, [_row(rank, r, searched) for rank, r in enumerate(results, 1)])


def _steps(trial: Trial) -> str:
    """Steps of fitting, and of refining where there is some."""
    refining = trial.config.refine.steps
    return f"{trial.config.train.steps:,}" + (f" + {refining:,}" if refining else "")


def _row(rank: int, result: TrialResult, searched: list[str]) -> dict[str, Any]:
    trial = result.trial
    return {
        "rank": rank,
        "trial": trial.name,
        "score": result.score,
        "share_of_budget": result.share,
        "seconds": result.seconds,
        "parameters": trial.parameters,
        "steps": trial.config.train.steps,
        "flops_per_step": trial.step_flops,
        "refining_steps": trial.config.refine.steps,
        "flops_per_refining_step": trial.refining_step_flops,
        "settings": {key: attrgetter(key)(trial.config) for key in searched},
        "failure": result.failure,
    }


def _label(key: str) -> str:
    section, _, name = key.rpartition(".")
    return f"{section.rpartition('.')[2]} {name}" if section.startswith("generator") else name


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
