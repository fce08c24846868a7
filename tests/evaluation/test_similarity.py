import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpg.errors import RPGError
from rpg.evaluation.similarity import Predictions, similarity, wrong_iou


def naive_iou(first: np.ndarray, second: np.ndarray) -> float:
    a, b = set(np.flatnonzero(first)), set(np.flatnonzero(second))
    return len(a & b) / len(a | b) if a | b else 1.0


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(0, 6), st.integers(1, 40), st.floats(0, 1))
def test_iou_equals_set_computation(seed: int, n: int, k: int, images: int, density: float) -> None:
    random = np.random.default_rng(seed)
    first, second = random.random((n, images)) < density, random.random((k, images)) < density
    expected = [[naive_iou(a, b) for b in second] for a in first]
    np.testing.assert_allclose(wrong_iou(first, second), np.array(expected).reshape(n, k), rtol=1e-15)


def test_two_networks_without_errors_are_identical() -> None:
    none, one = np.zeros((1, 5), bool), np.eye(1, 5, dtype=bool)
    assert wrong_iou(none, none) == 1
    assert wrong_iou(none, one) == 0


def test_summary_equals_naive_loops_within_tasks() -> None:
    random = np.random.default_rng(1)

    def group(tasks: list[str]) -> Predictions:
        return Predictions(random.random((len(tasks), 50)) < 0.2, tasks)

    generated, originals = group(["a", "b", "a", "b", "c"]), group(["a", "a", "b", "b", "b"])
    noised = {0.05: group(["b", "a"]), 0.01: group(["a", "a", "b"])}
    measured = similarity(generated, originals, noised)

    def pairs(first: Predictions, second: Predictions, same: bool) -> list[tuple[int, float]]:
        return [
            (i, naive_iou(first.wrong[i], second.wrong[j]))
            for i in range(len(first.tasks))
            for j in range(len(second.tasks))
            if first.tasks[i] == second.tasks[j] and not (same and i == j)
        ]

    def mean(found: list[tuple[int, float]]) -> float:
        return float(np.mean([value for _, value in found]))

    def mean_of_maxima(found: list[tuple[int, float]]) -> float:
        rows = {i for i, _ in found}
        return float(np.mean([max(value for j, value in found if j == i) for i in rows]))

    between = pairs(generated, originals, same=False)
    assert measured.generated_original == pytest.approx(mean(between))
    assert measured.generated_original_max == pytest.approx(mean_of_maxima(between))
    assert measured.generated_generated == pytest.approx(mean(pairs(generated, generated, same=True)))
    assert measured.original_original == pytest.approx(mean(pairs(originals, originals, same=True)))
    assert measured.original_original_max == pytest.approx(
        mean_of_maxima(pairs(originals, originals, same=True))
    )
    assert list(measured.noised_original_max) == [0.01, 0.05]
    for level, networks in noised.items():
        expected = mean_of_maxima(pairs(networks, originals, same=False))
        assert measured.noised_original_max[level] == pytest.approx(expected)
    assert np.isnan(measured.maxima_generated[4])  # task c has no original


def test_published_formulas_on_a_single_task() -> None:
    random = np.random.default_rng(2)
    wrong = random.random((7, 60)) < 0.3
    originals, generated = wrong[:4], wrong[4:]
    matrix = np.array([[naive_iou(a, b) for b in wrong] for a in wrong])
    measured = similarity(Predictions(generated, ["t"] * 3), Predictions(originals, ["t"] * 4), {})
    assert measured.original_original == pytest.approx((matrix[:4, :4].sum() - 4) / (4 * 3))
    assert measured.generated_generated == pytest.approx((matrix[4:, 4:].sum() - 3) / (3 * 2))
    assert measured.generated_original == pytest.approx(matrix[4:, :4].mean())
    assert measured.generated_original_max == pytest.approx(matrix[4:, :4].max(axis=1).mean())


def test_copies_have_similarity_one() -> None:
    wrong = np.random.default_rng(3).random((3, 100)) < 0.1
    group = Predictions(wrong, ["a", "b", "c"])
    assert similarity(group, group, {0.01: group}).generated_original_max == 1
    assert similarity(group, group, {0.01: group}).noised_original_max == {0.01: 1.0}


def test_similarities_without_a_pair_are_none() -> None:
    one = Predictions(np.ones((1, 3), bool), ["a"])
    nothing = Predictions(np.zeros((0, 0), bool), [])
    measured = similarity(one, nothing, {})
    assert measured.generated_original is None
    assert measured.generated_original_max is None
    assert measured.generated_generated is None
    assert measured.original_original is None


def test_different_images_are_refused() -> None:
    with pytest.raises(RPGError, match="same images"):
        wrong_iou(np.ones((1, 3), bool), np.ones((1, 4), bool))
    with pytest.raises(RPGError, match="generated: expected one task a model"):
        similarity(Predictions(np.ones((2, 3), bool), ["a"]), Predictions(np.ones((1, 3), bool), ["a"]), {})
