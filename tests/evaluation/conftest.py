"""Synthetic results, in the numbers that a digits run has."""

from collections.abc import Callable

import numpy as np
import pytest

from rpg.evaluation.results import Evaluated, Results, TaskSplit

UNSEEN = [314, 482, 589, 197, 462, 111, 101, 278, 793, 279, 653, 238, 1001, 141, 884, 592, 502, 643, 383, 128]


def synthetic_results(
    tasks: int = 20,
    models_per_task: int = 5,
    images: int = 540,
    conditions: bool = True,
    baselines: bool = True,
    task_name: Callable[[int], str] = str,
    name: str = "digits",
) -> Results:
    random = np.random.default_rng(0)
    originals: list[Evaluated] = []
    generated: list[Evaluated] = []
    noised: dict[float, list[Evaluated]] = {level: [] for level in (0.01, 0.02, 0.03, 0.04, 0.05)}

    def network(kind: str, number: int, split: TaskSplit, wrong: np.ndarray, distance: float) -> Evaluated:
        bits = tuple(float(bit) for bit in format(number, "010b"))
        accuracy = 1 - float(wrong.mean())
        label = f"{kind}_{number:04d}.safetensors"
        condition = bits if conditions else None
        return Evaluated(label, task_name(number), split, accuracy, wrong, condition, distance)

    for split, offset in ((TaskSplit.unseen, 0), (TaskSplit.seen, 1)):
        for number in [n + offset for n in UNSEEN[:tasks]]:
            hard = random.random(images) * random.uniform(0.6, 1.4)
            for _ in range(3):
                wrong = hard + 0.03 * random.standard_normal(images) > np.quantile(hard, 0.96)
                originals.append(network("original", number, split, wrong, random.normal(0.62, 0.05)))
                for level, group in noised.items():
                    noisy = wrong ^ (random.random(images) < 0.15 * level)
                    group.append(network(f"noised_{level}", number, split, noisy, 0.1))
            for _ in range(models_per_task):
                wrong = hard + 0.06 * random.standard_normal(images) > np.quantile(hard, 0.96)
                generated.append(network("generated", number, split, wrong, random.normal(0.5, 0.04)))
    names = [task_name(n) for n in UNSEEN[:tasks]]
    levels = {"ridge_2": 0.948, "ridge_1": 0.931, "ridge_3": 0.956, "nearest_task": 0.874, "centre": 0.61,
              "majority": 0.68}  # fmt: skip
    return Results(
        name=name,
        seed=0,
        config={"name": name, "train": {"steps": 2000, "learning_rate": 1e-3}, "shard": {"token_size": 256}},
        versions={"python": "3.11.2", "torch": "2.11.0", "ray": "2.50.0", "rpg": "0.1.0"},
        timing_seconds={"collect": 61.2, "shard": 3.4, "train": 148.9, "generate": 9.7, "evaluate": 6.1},
        originals=originals,
        generated=generated,
        noised=noised,
        baselines={
            key: {task: float(np.clip(random.normal(level, 0.02), 0, 1)) for task in names}
            for key, level in levels.items()
        }
        if baselines
        else {},
        sibling_distances=list(random.normal(0.42, 0.05, 3066)),
        losses=[
            (step, float(0.9 * np.exp(-step / 400) + 0.12 + 0.03 * random.random()))
            for step in range(0, 2001, 10)
        ],
    )


@pytest.fixture(scope="session")
def results() -> Results:
    return synthetic_results()


@pytest.fixture(scope="session")
def make_results() -> Callable[..., Results]:
    return synthetic_results
