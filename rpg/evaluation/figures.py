"""The report's figures, drawn with matplotlib's object interface: no windows, no global figure state.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; every series also has its own marker
or line. Each figure comes in a light and a dark theme.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from rpg.tasks.families import Metric

FloatArray = npt.NDArray[np.float64]

MOST_TASKS = 40
"""Most tasks that `score_per_task` draws."""

_WIDTH = 7.2
_LABEL_CHARACTERS = 26
_ACCURACY_TICKS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0)
_STRETCH = 1.02


class Points(NamedTuple):
    """A group of networks in the scatter."""

    similarity: FloatArray
    """[models]: largest similarity to an original; NaN is left out."""
    score: FloatArray
    """[models]; NaN is left out."""


class TaskRow(NamedTuple):
    """One task in `score_per_task`."""

    label: str
    originals: Sequence[float]
    """Scores of the trained networks."""
    generated: Sequence[float]
    baselines: Mapping[str, float]


@dataclass(frozen=True)
class Theme:
    """Colours of a figure."""

    name: str
    ink: str
    faint: str
    originals: str
    generated: str
    generated_seen: str
    noised: tuple[str, str]
    """Lightest and darkest noise level."""
    baselines: tuple[str, ...]


LIGHT = Theme(
    name="light",
    ink="#222222",
    faint="#d9d9d9",
    originals="#0072b2",
    generated="#d55e00",
    generated_seen="#cc79a7",
    noised=("#b5b5b5", "#4a4a4a"),
    baselines=("#009e73", "#a5710a", "#56b4e9", "#7a5195", "#8a8a8a", "#bcbcbc", "#7f3b08", "#2a4d69"),
)
DARK = Theme(
    name="dark",
    ink="#e6e6e6",
    faint="#444a52",
    originals="#56b4e9",
    generated="#f0883e",
    generated_seen="#e8a3c9",
    noised=("#6d747d", "#d5d9de"),
    baselines=("#2fc79a", "#e6b422", "#7fa8ff", "#b39ddb", "#9aa0a6", "#686e76", "#c98b6b", "#9fd3c7"),
)


def similarity_scatter(
    originals: Points, generated: Points, noised: Mapping[float, Points], metric: str, theme: Theme = LIGHT
) -> Figure:
    """The published scatter: largest similarity to the originals against the score.

    Copies sit at the right, at similarity 1; new networks as good as the originals sit at their height and
    to the left of lightly noised originals.
    """
    with style(theme):
        figure, axes = _canvas(_WIDTH, 4.6)
        _scatter(axes, originals, s=34, marker="o", alpha=0.75, color=theme.originals, label="originals")
        _scatter(axes, generated, s=40, marker="^", alpha=0.75, color=theme.generated, label="generated")
        for position, level in enumerate(sorted(noised)):
            colour = _between(*theme.noised, position / max(1, len(noised) - 1))
            label = f"noised, {level:g}"
            _scatter(axes, noised[level], s=20, marker="s", alpha=0.55, color=colour, label=label, zorder=0.9)
        axes.set_xlabel("largest similarity to an original (IoU of wrong predictions)")
        axes.set_ylabel(metric)
        axes.margins(0.04)
        legend_below(figure, *axes.get_legend_handles_labels(), columns=4)
        return figure


def score_per_task(
    rows: Sequence[TaskRow], names: Mapping[str, str], metric: Metric, theme: Theme = LIGHT
) -> Figure:
    """Score per unseen task: originals, generated with their spread, baselines.

    The axis of accuracies is stretched towards 1, where good networks differ, and still has room for a weak
    baseline.

    Args:
        rows: one a task, in the order drawn; of more than `MOST_TASKS`, those with the worst generated
            networks are drawn.
        names: label of each baseline, in the order of the legend.
        metric: that scores are of.
        theme: colours.
    """
    sign = 1.0 if metric.higher_is_better else -1.0
    worst = sorted(rows, key=lambda row: sign * float(np.mean(row.generated)) if row.generated else -np.inf)
    chosen = rows if len(rows) <= MOST_TASKS else worst[:MOST_TASKS]
    placed = [(row, float(len(chosen) - 1 - position)) for position, row in enumerate(chosen)]
    trained = [(float(np.mean(row.originals)), at) for row, at in placed if row.originals]
    means = [(float(np.mean(row.generated)), at) for row, at in placed if row.generated]
    with style(theme):
        figure, axes = _canvas(_WIDTH, 1.7 + 0.33 * max(3, len(chosen)))
        for _, at in placed[::2]:
            axes.axhspan(at - 0.5, at + 0.5, color=theme.faint, alpha=0.25, linewidth=0, zorder=0)
        for row, at in placed:
            if row.generated:
                ends = [min(row.generated), max(row.generated)]
                axes.plot(ends, [at, at], color=theme.generated, linewidth=6, alpha=0.3, zorder=3)
        label = "generated (mean, range)"
        _mark(axes, means, s=44, marker="^", linewidths=0, color=theme.generated, label=label, zorder=5)
        _mark(
            axes,
            trained,
            s=110,
            marker="|",
            linewidths=2.4,
            color=theme.originals,
            label="originals (mean)",
            zorder=6,
        )
        for position, (key, name) in enumerate(names.items()):
            known = [(row.baselines[key], at) for row, at in placed if key in row.baselines]
            colour = theme.baselines[position % len(theme.baselines)]
            # Seven markers and eight colours: no two of many baselines have both in common.
            marker = "DsPXvp*"[position % 7]
            _mark(axes, known, s=26, marker=marker, linewidths=0, color=colour, label=name, zorder=4)
        labels = [_short(row.label) for row, _ in placed]
        axes.set_yticks([at for _, at in placed], labels, fontfamily="monospace", fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, max(len(chosen) - 0.4, 0.6))
        axes.grid(visible=False, axis="y")
        shown = [v for row in chosen for v in (*row.originals, *row.generated, *row.baselines.values())]
        if metric.name == "accuracy" and max(shown, default=0) <= 1:
            axes.set_xscale("function", functions=(_stretched, _unstretched))
            low, high = axes.get_xlim()
            axes.set_xlim(max(low, 0.0), min(high, 1.0))
            axes.set_xticks([tick for tick in _ACCURACY_TICKS if low <= tick <= high])
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.set_xlabel("accuracy (axis stretched towards 1)")
        else:
            unit = f" [{metric.unit}]" if metric.unit else ""
            # Losses of weak baselines would press all others into a line.
            if shown and 0 < 30 * min(shown) < max(shown):
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            direction = "" if metric.higher_is_better else " (lower is better)"
            axes.set_xlabel(f"{metric.name}{unit}{direction}")
        if len(chosen) < len(rows):
            axes.set_title(f"the {len(chosen)} worst of {len(rows)} tasks", loc="left")
        legend_below(figure, *axes.get_legend_handles_labels(), columns=3)
        return figure


def distance_histogram(groups: Mapping[str, Sequence[float]], theme: Theme = LIGHT) -> Figure:
    """Distances to the nearest training checkpoint: of generated networks, siblings and held-out originals.

    Args:
        groups: relative distances by series: any of "siblings", "heldout", "unseen", "seen".
        theme: colours.
    """
    series = {
        "siblings": ("training checkpoints, to a sibling", theme.noised[0], "-"),
        "heldout": ("originals of unseen tasks", theme.originals, "--"),
        "unseen": ("generated, unseen tasks", theme.generated, "-"),
        "seen": ("generated, seen tasks", theme.generated_seen, ":"),
    }
    given = [key for key in series if len(groups.get(key, ()))]
    top = max((max(groups[key]) for key in given), default=0.0) or 1.0
    bins = np.linspace(0, 1.05 * top, 41).tolist()
    with style(theme):
        figure, axes = _canvas(_WIDTH, 3.9)
        for key in given:
            label, colour, line = series[key]
            number = len(groups[key])
            drawn: dict[str, Any] = {
                "bins": bins,
                "weights": np.full(number, 100 / number),
                "color": colour,
                "label": f"{label} ({number:,})",
            }
            if key == "siblings":
                axes.hist(groups[key], histtype="stepfilled", alpha=0.6, linewidth=0, **drawn)
            else:
                axes.hist(groups[key], histtype="step", linewidth=2.0, linestyle=line, **drawn)
        axes.set_xlim(0, bins[-1])
        axes.set_xlabel("distance to the nearest training checkpoint (0: a copy; 1: spread of the set)")
        axes.set_ylabel("share of networks, %")
        legend_below(figure, *axes.get_legend_handles_labels(), columns=2)
        return figure


def loss_curve(losses: Sequence[tuple[int, float]], theme: Theme = LIGHT) -> Figure:
    """Training loss over steps, as logged and smoothed."""
    with style(theme):
        figure, axes = _canvas(_WIDTH, 3.6)
        finite = [(step, loss) for step, loss in losses if np.isfinite(loss) and loss > 0]
        if finite:
            steps, values = np.array(finite, dtype=np.float64).T
            axes.plot(steps, values, color=theme.originals, linewidth=1.0, alpha=0.45, label="as logged")
            if len(values) >= 8:
                axes.plot(steps, _smoothed(values), color=theme.generated, linewidth=2.2, label="smoothed")
            # A logarithmic axis over less than a decade may find no round number to label.
            if values.max() > 10 * values.min():
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.set_xlim(min(steps[0], 0), steps[-1] if steps[-1] > 0 else 1)
        axes.set_xlabel("training step")
        axes.set_ylabel("loss")
        legend_below(figure, *axes.get_legend_handles_labels(), columns=2)
        return figure


def to_svg(figure: Figure) -> bytes:
    """A figure as SVG with a transparent background; the same figure gives the same bytes."""
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "rpg"}):
        return _saved(figure, "svg", transparent=True, metadata={"Date": None})


def to_png(figure: Figure, dots_per_inch: int = 160) -> bytes:
    """A figure as PNG on an opaque background."""
    return _saved(figure, "png", dpi=dots_per_inch)


def _saved(figure: Figure, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, bbox_inches="tight", pad_inches=0.08, **options)
    return buffer.getvalue()


@contextmanager
def style(theme: Theme) -> Iterator[None]:
    """Draw the block's figures in a theme."""
    settings: dict[Any, Any] = {
        "figure.facecolor": "#ffffff" if theme is LIGHT else "#16191d",
        "axes.facecolor": "none",
        "font.family": "DejaVu Sans",
        "font.size": 11,
        "axes.labelsize": 11,
        "axes.titlesize": 11,
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "axes.edgecolor": theme.ink,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.ink,
        "ytick.color": theme.ink,
        "grid.color": theme.faint,
        "grid.linewidth": 0.8,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        # A task's name may hold a single "$", which Matplotlib would take for the start of a formula.
        "text.parse_math": False,
    }
    with matplotlib.rc_context(settings):
        yield


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Matplotlib makes more ticks when it draws, after the block of `style`, so their looks are set here.
    axes.tick_params(colors=matplotlib.rcParams["text.color"], labelsize=10)
    return figure, axes


def _mark(axes: Axes, points: Sequence[tuple[float, float]], **style: Any) -> None:
    if points:
        axes.scatter([x for x, _ in points], [y for _, y in points], **style)


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], columns: int) -> None:
    """Put a legend below the axes, its markers opaque."""
    if handles:
        legend = figure.legend(
            handles, labels, loc="outside lower center", ncols=columns, columnspacing=1.4, handletextpad=0.5
        )
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1)


def _scatter(axes: Axes, points: Points, **style: Any) -> None:
    keep = ~(np.isnan(points.similarity) | np.isnan(points.score))
    axes.scatter(points.similarity[keep], points.score[keep], linewidths=0, **style)


def _stretched(accuracy: FloatArray) -> FloatArray:
    return np.asarray(-np.log(_STRETCH - np.clip(accuracy, None, 1.0)))


def _unstretched(position: FloatArray) -> FloatArray:
    return np.asarray(_STRETCH - np.exp(-np.asarray(position)))


def _smoothed(values: FloatArray) -> FloatArray:
    """Geometric running mean over a twentieth of the curve; windows are cut off at both ends."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(np.log(values))])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach, len(values) - 1) + 1
    return np.asarray(np.exp((sums[last] - sums[first]) / (last - first)))


def _between(first: str, second: str, share: float) -> str:
    pairs = [(int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def _short(label: str) -> str:
    line = " ".join(label.split())
    return line if len(line) <= _LABEL_CHARACTERS else f"{line[: _LABEL_CHARACTERS - 1]}…"
