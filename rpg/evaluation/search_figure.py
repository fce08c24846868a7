"""The figure of a search: what a good score costs in parameters and in seconds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from rpg.evaluation.figures import LIGHT, Theme, legend_below, style

_SIZE = (9.6, 4.4)
_LEAST_SPAN = 0.002
"""Least span of the axis of scores, so that noise does not look like a difference."""
_EDGE = 0.03
"""Height, as a share of the picture's, at which trials are drawn that lie below the picture."""


class Tried(NamedTuple):
    """One trial of a search."""

    name: str
    score: float
    """Of networks generated for the validation tasks, at the trial's end."""
    parameters: int
    """Parameters of the generator."""
    seconds: float
    """Seconds of training."""
    finished: bool
    """Whether it spent its whole budget; the others were stopped early."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices, by rising cost, of the points (cost, score) that no other point beats in both."""
    front: list[int] = []
    best = float("-inf")
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            front.append(index)
    return front


def search_figure(
    trials: Sequence[Tried], base: str, higher_is_better: bool = True, theme: Theme = LIGHT
) -> Figure:
    """Score against generator parameters and against seconds, with the Pareto front of finished trials.

    Args:
        trials: in any order.
        base: name of the trial with the config's own settings.
        higher_is_better: whether high scores are good ones; good ones are drawn at the top.
        theme: colours.
    """
    sign = 1.0 if higher_is_better else -1.0
    trials = [trial._replace(score=sign * trial.score) for trial in trials]
    with style(theme):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        _panel(left, trials, [float(trial.parameters) for trial in trials], base, theme)
        left.set_xlabel("parameters of the generator")
        left.set_ylabel("score on validation tasks" + ("" if higher_is_better else " (lower is better)"))
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{sign * value:g}"))
        _panel(right, trials, [trial.seconds for trial in trials], base, theme)
        right.set_xlabel("seconds of training")
        handles, labels = left.get_legend_handles_labels()
        legend_below(figure, handles, labels, columns=4)
        return figure


def _range(trials: Sequence[Tried]) -> tuple[float, float] | None:
    """The range of scores to show: that of finished trials, since others may lie far below."""
    finished = [trial.score for trial in trials if trial.finished]
    if not finished:
        return None
    low, high = min(finished), max(finished)
    span = max(high - low, _LEAST_SPAN)
    return low - span, high + 0.5 * span


def _panel(axes: Axes, trials: Sequence[Tried], costs: list[float], base: str, theme: Theme) -> None:
    placed = list(zip(trials, costs, strict=True))
    finished = [(trial, cost) for trial, cost in placed if trial.finished]
    stopped = [(trial, cost) for trial, cost in placed if not trial.finished]
    if limits := _range(trials):
        low, high = limits
        axes.set_ylim(low, high)
        edge = low + _EDGE * (high - low)
        below = [(trial._replace(score=edge), cost) for trial, cost in stopped if trial.score < low]
        stopped = [(trial, cost) for trial, cost in stopped if trial.score >= low]
        _points(
            axes, below, s=30, marker="v", linewidths=0, color=theme.noised[0], label="stopped early, below",
            zorder=2,
        )  # fmt: skip
    _points(axes, stopped, s=26, marker="x", color=theme.noised[0], label="stopped early", zorder=2)
    _points(
        axes, finished, s=44, marker="o", linewidths=0, color=theme.originals, label="whole budget", zorder=4
    )
    front = [finished[i] for i in pareto_front([(cost, trial.score) for trial, cost in finished])]
    line = ([cost for _, cost in front], [trial.score for trial, _ in front])
    if front:
        axes.plot(*line, color=theme.generated, linewidth=1.6, label="Pareto front", zorder=3)
    for trial, cost in front:
        axes.annotate(trial.name, (cost, trial.score), xytext=(5, 5), textcoords="offset points", fontsize=9)
    own = [(trial, cost) for trial, cost in placed if trial.name == base]
    _points(
        axes, own, s=150, marker="o", facecolors="none", edgecolors=theme.generated, linewidths=1.8,
        label="the config itself", zorder=5,
    )  # fmt: skip
    if min(costs, default=0) > 0 and max(costs) > 3 * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.margins(x=0.1)
    if not limits:
        axes.margins(y=0.1)
    axes.tick_params(labelsize=10)


def _points(axes: Axes, placed: Sequence[tuple[Tried, float]], **appearance: Any) -> None:
    if placed:
        axes.scatter([cost for _, cost in placed], [trial.score for trial, _ in placed], **appearance)


def _short(value: float) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"
