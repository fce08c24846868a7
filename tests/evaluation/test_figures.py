import io
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from rpg.evaluation.figures import (
    DARK,
    LIGHT,
    MOST_TASKS,
    Points,
    TaskRow,
    Theme,
    distance_histogram,
    loss_curve,
    score_per_task,
    similarity_scatter,
    to_png,
    to_svg,
)
from rpg.evaluation.judge import ACCURACY
from rpg.tasks.families import Metric

NAMES = {"ridge_1": "ridge regression, order 1", "own": "something else"}


def figures(theme: Theme) -> dict[str, Figure]:
    points = Points(np.array([0.4, np.nan, 0.6]), np.array([0.9, 0.91, 0.95]))
    rows = [TaskRow(f"task {i}", [0.9, 0.92], [0.8, 0.95], {"ridge_1": 0.7}) for i in range(3)]
    return {
        "scatter": similarity_scatter(points, points, {0.01: points, 0.05: points}, "accuracy", theme),
        "scatter without noise": similarity_scatter(points, points, {}, "accuracy", theme),
        "tasks": score_per_task(rows, NAMES, ACCURACY, theme),
        "sparse tasks": score_per_task(
            [TaskRow("", [], [], {}), TaskRow("x", [1.0], [], {})], {}, ACCURACY, theme
        ),
        "losses": score_per_task(
            [TaskRow("x", [1e-4, 12.0], [1e5], {})], {}, Metric("mse", higher_is_better=False), theme
        ),
        "distances": distance_histogram({"siblings": [0.4, 0.5], "unseen": [0.0], "seen": []}, theme),
        "only copies": distance_histogram({"unseen": [0.0, 0.0]}, theme),
        "loss": loss_curve([(step, 1 / (1 + step)) for step in range(0, 500, 10)], theme),
        "one loss": loss_curve([(0, 1.0)], theme),
        "broken loss": loss_curve([(0, float("nan")), (1, float("inf"))], theme),
    }


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_every_figure_is_a_picture(theme: Theme) -> None:
    for name, figure in figures(theme).items():
        assert ElementTree.fromstring(to_svg(figure)).tag.endswith("svg"), name
        with Image.open(io.BytesIO(to_png(figure, dots_per_inch=50))) as image:
            colours = image.convert("RGB").getcolors(1 << 24)
            assert image.width > 300
            assert colours is not None
            assert len(colours) > 2, name


def test_same_data_same_bytes() -> None:
    first, second = figures(LIGHT), figures(LIGHT)
    assert to_svg(first["tasks"]) == to_svg(second["tasks"])


def test_scatter_draws_every_known_point() -> None:
    axes = figures(LIGHT)["scatter"].axes[0]
    assert [np.asarray(collection.get_offsets()).shape[0] for collection in axes.collections] == [2, 2, 2, 2]


def test_task_labels_are_text_not_formulas_and_cut() -> None:
    rows = [TaskRow("$\\frac{1}\n<b>&" + "x" * 100, [0.9], [0.9], {}), TaskRow("$", [0.9], [0.9], {})]
    figure = score_per_task(rows, {}, ACCURACY, LIGHT)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert all(len(label) <= 26 for label in labels)
    assert b"<b>" not in to_svg(figure)


def test_of_too_many_tasks_the_worst_are_drawn() -> None:
    rows = [TaskRow(str(i), [0.9], [i / 100], {}) for i in range(100)]
    axes = score_per_task(rows, {}, ACCURACY, LIGHT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(i) for i in range(MOST_TASKS)]
    assert f"{MOST_TASKS} worst of 100" in axes.get_title(loc="left")
    axes = score_per_task(rows, {}, Metric("mse", higher_is_better=False), LIGHT).axes[0]
    labels = {label.get_text() for label in axes.get_yticklabels()}
    assert labels == {str(i) for i in range(100 - MOST_TASKS, 100)}
