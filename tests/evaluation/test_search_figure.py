"""The figure of a search: the Pareto front against its definition, and that it draws whatever there is."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpg.evaluation.figures import to_svg
from rpg.evaluation.search_figure import Tried, pareto_front, search_figure

POINTS = st.lists(st.tuples(st.integers(0, 6).map(float), st.integers(0, 6).map(float)), max_size=12)


@given(POINTS)
def test_pareto_front(points: list[tuple[float, float]]) -> None:
    def beaten(cost: float, accuracy: float) -> bool:
        return any((c <= cost and a >= accuracy) and (c < cost or a > accuracy) for c, a in points)

    front = pareto_front(points)
    assert {points[i] for i in front} == {point for point in points if not beaten(*point)}
    assert [points[i][0] for i in front] == sorted({points[i][0] for i in front})


@pytest.mark.parametrize(
    "trials",
    [
        [],
        [Tried("0", 0.9, 1000, 3.0, True)],
        [Tried("0", 0.9, 1000, 3.0, False), Tried("1", 0.95, 9_000_000, 100.0, False)],
        [Tried(str(i), 0.9 + i / 100, 1000 * (i + 1), 0.0, i % 2 == 0) for i in range(12)],
    ],
)
def test_the_figure_is_drawn_for_any_mix_of_trials(trials: list[Tried]) -> None:
    for higher_is_better in (True, False):
        drawn = to_svg(search_figure(trials, "0", higher_is_better))
        ElementTree.fromstring(drawn)
    assert b"parameters of the generator" in drawn or b"<path" in drawn
