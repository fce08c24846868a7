"""The results of a run's evaluation: all that the report and its figures are made from."""

import importlib.metadata
import math
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from rpg import __version__
from rpg.errors import RPGError
from rpg.evaluation.judge import ACCURACY
from rpg.evaluation.similarity import Predictions
from rpg.tasks.families import Metric

_PACKAGES = ("numpy", "omegaconf", "pyarrow", "ray", "safetensors", "scikit-learn", "torch")


class TaskSplit(StrEnum):
    """Whether the generator was trained on checkpoints of a network's task."""

    seen = "seen"
    unseen = "unseen"


@dataclass(frozen=True)
class Evaluated:
    """One network, trained or generated or noised."""

    name: str
    """Name of its file."""
    task: str
    """The task's name; networks of one task share it. Any one value for collections without tasks."""
    split: TaskSplit
    score: float | None
    """Value of the metric that counts; None if it was not measured."""
    wrong: npt.NDArray[np.bool_] | None = None
    """[inputs]: True where the prediction is wrong; the same inputs in the same order for all networks. None
    if predictions were not looked at."""
    condition: tuple[float, ...] | None = None
    """The task's condition; None for collections without conditions."""
    distance: float | None = None
    """To the nearest training checkpoint, relative (`rpg.evaluation.distance`); None if not measured."""
    centre_distance: float | None = None
    """To the mean training checkpoint, relative."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All that was measured of it, by name."""
    failure: str | None = None
    """Why it could not be measured."""
    answers: Tensor | None = None
    """[inputs]: what it answers; None if answers were not looked at, or are not needed."""


@dataclass(frozen=True)
class Results:
    """One run's evaluation. Fields that were not measured (without conditions or noise levels) are empty."""

    name: str
    """Name of the run."""
    seed: int
    config: Mapping[str, Any]
    """The whole configuration, as plain dictionaries."""
    versions: Mapping[str, str]
    """Package or code version by name."""
    timing_seconds: Mapping[str, float]
    """By stage: collect, shard, train, generate, evaluate."""
    originals: Sequence[Evaluated]
    """Trained networks, of unseen tasks and of the seen ones that were generated for."""
    generated: Sequence[Evaluated]
    noised: Mapping[float, Sequence[Evaluated]] = field(default_factory=dict)
    """Per noise level, originals with noise added."""
    recomputed: Sequence[Evaluated] = ()
    """Some generated networks of the unseen tasks, with BatchNorm's statistics recomputed on training data.
    For a collection without unseen tasks: of any task."""
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Score by baseline (best_original, centre, nearest_task, ridge_1, ridge_2, ridge_3, majority, and what a
    family calls its references), then by unseen task. For a collection without unseen tasks: by any task."""
    sibling_distances: Sequence[float] = ()
    """Relative distances of training checkpoints to the nearest other one of their task."""
    generated_distances: Sequence[float] = ()
    """Relative distances of generated networks to the nearest other generated one of their task."""
    noised_distances: Mapping[float, Sequence[float]] = field(default_factory=dict)
    """Per noise level, relative distances of noised training checkpoints to the training set."""
    losses: Sequence[tuple[int, float]] = ()
    """Training curve: (step, loss)."""
    metric: Metric | None = ACCURACY
    """The metric that scores are of; None if nothing could measure them."""
    other_metrics: Sequence[Metric] = ()
    """What is known about further metrics."""
    left_out: Sequence[str] = ()
    """Why something that a report has is not in this one, a line for each reason."""


def versions() -> dict[str, str]:
    """The versions that a result is made with, by name.

    They are those of Python, of RPG (with its commit where it runs from a checkout) and of the packages that
    results depend on.
    """
    found = {"python": platform.python_version(), "rpg": __version__}
    commit = _commit()
    if commit:
        found["rpg commit"] = commit
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_results(results: Results) -> None:
    """Refuse results that cannot be summarised.

    Raises:
        RPGError: naming the network at fault: a score that is not finite, an accuracy outside 0…1, or
            predictions on other inputs.
    """
    everything = [*results.originals, *results.generated, *results.recomputed]
    everything += [network for group in results.noised.values() for network in group]
    first = next((network for network in everything if network.wrong is not None), None)
    for network in everything:
        if network.score is not None and not math.isfinite(network.score):
            raise RPGError(f"{network.name}: expected a finite score, got {network.score}")
        # An accuracy without predictions may be a percentage.
        is_share = results.metric == ACCURACY and network.wrong is not None
        if is_share and network.score is not None and not 0 <= network.score <= 1:
            raise RPGError(f"{network.name}: expected an accuracy in 0…1, got {network.score}")
        if first is None or first.wrong is None or network.wrong is None:
            continue
        if network.wrong.ndim != 1 or network.wrong.shape != first.wrong.shape:
            raise RPGError(
                f"{network.name}: expected predictions on the same {len(first.wrong)} inputs as "
                f"{first.name}, got shape {list(network.wrong.shape)}"
            )
        if network.answers is not None and network.answers.shape != network.wrong.shape:
            raise RPGError(
                f"{network.name}: expected {len(network.wrong)} answers, got {list(network.answers.shape)}"
            )


def of_split(networks: Sequence[Evaluated], split: TaskSplit) -> list[Evaluated]:
    """The networks of one split, in order."""
    return [network for network in networks if network.split == split]


def predictions(networks: Sequence[Evaluated]) -> Predictions:
    """The matrix of wrong predictions that similarities are computed from, of the networks that have some."""
    known = [(network.task, network.wrong) for network in networks if network.wrong is not None]
    if not known:
        return Predictions(np.zeros((0, 0), dtype=np.bool_), [])
    return Predictions(np.stack([wrong for _, wrong in known]).astype(np.bool_), [task for task, _ in known])


def condition_label(condition: Sequence[float] | None) -> str:
    """A condition in a few characters: its bits, or its first values; empty without a condition."""
    if condition is None:
        return ""
    if all(value in (0, 1) for value in condition) and len(condition) <= 16:
        return "".join(str(int(value)) for value in condition)
    shown = ", ".join(f"{value:.3g}" for value in condition[:3])
    return f"{shown}, …" if len(condition) > 3 else shown


def _commit() -> str | None:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
