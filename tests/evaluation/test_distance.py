import numpy as np
import pytest
import torch
from torch import Tensor

from rpg.errors import RPGError
from rpg.evaluation.distance import nearest_checkpoint, sibling_distances, spread, weight_distances


def brute_force(queries: Tensor, train: Tensor) -> tuple[np.ndarray, np.ndarray]:
    difference = queries.double().numpy()[:, None, :] - train.double().numpy()[None, :, :]
    distances = np.sqrt((difference**2).sum(axis=-1))
    return distances.min(axis=1), distances.argmin(axis=1)


@pytest.mark.parametrize("chunk", [64, 1 << 22])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_nearest_equals_float64_brute_force(chunk: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(37, 211, generator=generator) + offset
    queries = torch.cat([torch.randn(9, 211, generator=generator) + offset, train[5:8], train[11:12] + 1e-3])
    nearest = nearest_checkpoint(queries, train, chunk_elements=chunk)
    expected, index = brute_force(queries, train)
    np.testing.assert_allclose(nearest.distance.numpy(), expected, rtol=1e-12)
    np.testing.assert_array_equal(nearest.index.numpy(), index)
    assert (nearest.distance[9:12] == 0).all()


def test_distances_of_near_copies_are_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    train = torch.randn(50, 1000, generator=generator)
    queries = train + 1e-6 * torch.randn(50, 1000, generator=generator)
    nearest = nearest_checkpoint(queries, train)
    expected, _ = brute_force(queries, train)
    np.testing.assert_allclose(nearest.distance.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_distances_are_relative_to_the_spread_of_the_training_set(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    tasks = ["a", "b", "a", "c", "b", "a"]
    train = torch.randn(6, 40, generator=generator).to(dtype)
    generated = torch.randn(3, 40, generator=generator).to(dtype)
    heldout = torch.randn(2, 40, generator=generator).to(dtype)
    found = weight_distances(generated, ["a", "b", "a"], train, tasks, heldout)
    exact = train.double().numpy()
    scale = np.sqrt(((exact - exact.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert found.scale == pytest.approx(scale, rel=1e-12)
    np.testing.assert_allclose(found.generated.numpy(), brute_force(generated, train)[0] / scale, rtol=1e-12)
    np.testing.assert_allclose(found.heldout.numpy(), brute_force(heldout, train)[0] / scale, rtol=1e-12)
    expected = [
        min(np.linalg.norm(exact[i] - exact[j]) for j in range(6) if j != i and tasks[i] == tasks[j])
        for i in range(6)
        if tasks.count(tasks[i]) > 1
    ]
    np.testing.assert_allclose(found.siblings.numpy(), np.array(expected) / scale, rtol=1e-12)
    made = generated.double().numpy()
    apart = np.linalg.norm(made[0] - made[2]) / scale
    np.testing.assert_allclose(found.generated_siblings.numpy(), [apart, apart], rtol=1e-12)
    for rows, distances in ((made, found.generated_to_centre), (heldout.double(), found.heldout_to_centre)):
        expected_lengths = np.linalg.norm(np.asarray(rows) - exact.mean(axis=0), axis=1) / scale
        np.testing.assert_allclose(distances.numpy(), expected_lengths, rtol=1e-9)


def test_siblings_of_a_large_task_are_found_as_those_of_a_small_one() -> None:
    train = torch.randn(40, 30, generator=torch.Generator().manual_seed(5))
    found = sibling_distances(train, ["large"] * 30 + ["small"] * 4 + [f"alone {i}" for i in range(6)])
    apart = torch.cdist(train.double(), train.double()).fill_diagonal_(torch.inf)
    expected = torch.cat([apart[:30, :30].amin(1), apart[30:34, 30:34].amin(1)])
    torch.testing.assert_close(found, expected)


def test_sets_without_siblings_or_heldout_originals() -> None:
    found = weight_distances(torch.zeros(1, 4), ["a"], torch.eye(3, 4), ["a", "b", "c"])
    assert found.siblings.numel() == 0
    assert found.heldout.numel() == 0
    assert sibling_distances(torch.eye(2), ["a", "a"]).tolist() == pytest.approx([2**0.5] * 2)


def test_bad_input() -> None:
    with pytest.raises(RPGError, match="equal width"):
        nearest_checkpoint(torch.zeros(1, 4), torch.zeros(2, 5))
    with pytest.raises(RPGError, match="at least one"):
        nearest_checkpoint(torch.zeros(1, 4), torch.zeros(0, 4))
    with pytest.raises(RPGError, match="all are equal"):
        weight_distances(torch.zeros(1, 4), ["a"], torch.ones(3, 4), ["a"] * 3)
    with pytest.raises(RPGError, match="train_tasks"):
        weight_distances(torch.zeros(1, 4), ["a"], torch.eye(4), ["a"])
    with pytest.raises(RPGError, match="generated_tasks"):
        weight_distances(torch.zeros(1, 4), [], torch.eye(4), ["a"] * 4)
    assert spread(torch.ones(3, 4)) == 0
