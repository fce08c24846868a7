"""Similarity of networks as published: intersection over union of their wrong predictions.

Two networks that fail on the same images are similar, whatever their weights look like (arXiv 2501.11587,
section on similarity; the same measure as in p-diff). Networks for different tasks are never compared.

Originals with a little noise added show which similarity counts as a copy: they are the best that a generator
which memorises would produce. Generated networks should be less similar to the originals than these, at the
same accuracy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rpg.errors import RPGError

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]

# The constants of the published script.
_PRE_MEAN = 0.95
_FLOOR = 0.05
_CLIP = 0.001


class Predictions(NamedTuple):
    """Networks evaluated on one test set."""

    wrong: BoolArray
    """[models, images]: True where the prediction is wrong."""
    tasks: Sequence[str]
    """[models]: the task of each; only networks of the same task are compared."""


@dataclass(frozen=True)
class Similarity:
    """Similarities within tasks, averaged over pairs; None where there is no pair. All in 0…1."""

    generated_original: float | None
    """Mean over all pairs of a generated network and an original of its task."""
    generated_original_max: float | None
    """Mean over generated networks of the largest similarity to an original of its task."""
    generated_generated: float | None
    """Mean over pairs of different generated networks."""
    original_original: float | None
    """Mean over pairs of different originals."""
    original_original_max: float | None
    """Mean over originals of the largest similarity to another original of its task."""
    noised_original_max: dict[float, float | None]
    """Per noise level: mean over noised originals of the largest similarity to an original, their own too."""
    maxima_generated: FloatArray
    """[generated]: largest similarity to an original of the task; NaN where the task has none."""
    maxima_originals: FloatArray
    """[originals]: largest similarity to another original of the task; NaN where there is no other."""
    maxima_noised: dict[float, FloatArray]
    """Per noise level, [noised]: largest similarity to an original of the task."""


def wrong_iou(first: BoolArray, second: BoolArray) -> FloatArray:
    """Intersection over union of wrong predictions for every pair of two groups of networks.

    Args:
        first: [n, images], True where wrong.
        second: [k, images].

    Returns:
        [n, k] in 0…1. Two networks without a single error have an empty union; they predict alike on
        every image, so their similarity is defined as 1. (The published script divides by zero there.)

    Raises:
        RPGError: if the two were not evaluated on the same number of images.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise RPGError(
            f"wrong predictions: expected [models, images] over the same images, "
            f"got {list(first.shape)} and {list(second.shape)}"
        )
    # Counts are integers below 2**53, which float64 adds exactly and BLAS multiplies fast; NumPy's integer
    # product is a plain loop.
    intersection = first.astype(np.float64) @ second.astype(np.float64).T
    union = first.sum(axis=1)[:, None] + second.sum(axis=1)[None, :] - intersection
    return np.where(union > 0, intersection / np.maximum(union, 1), 1.0)


def similarity(
    generated: Predictions, originals: Predictions, noised: Mapping[float, Predictions]
) -> Similarity:
    """Similarities of one test set, as in the published summary but within tasks.

    Args:
        generated: generated networks.
        originals: trained networks of the same tasks.
        noised: per noise level, originals with noise added (`add_noise`), to compare with.

    Raises:
        RPGError: if groups disagree on the images, or a group's `tasks` on its models.
    """
    for name, group in {"generated": generated, "originals": originals, **_named(noised)}.items():
        if len(group.tasks) != len(group.wrong):
            raise RPGError(
                f"{name}: expected one task a model, got {len(group.tasks)} for {len(group.wrong)}"
            )
    to_originals = _within_tasks(generated, originals)
    among_generated = _without_self(_within_tasks(generated, generated))
    among_originals = _without_self(_within_tasks(originals, originals))
    maxima_noised = {
        level: _row_maxima(_within_tasks(group, originals)) for level, group in sorted(noised.items())
    }
    maxima_generated, maxima_originals = _row_maxima(to_originals), _row_maxima(among_originals)
    return Similarity(
        generated_original=_mean(to_originals),
        generated_original_max=_mean(maxima_generated),
        generated_generated=_mean(among_generated),
        original_original=_mean(among_originals),
        original_original_max=_mean(maxima_originals),
        noised_original_max={level: _mean(maxima) for level, maxima in maxima_noised.items()},
        maxima_generated=maxima_generated,
        maxima_originals=maxima_originals,
        maxima_noised=maxima_noised,
    )


def add_noise(
    state_dict: Mapping[str, Tensor], level: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """A copy of a checkpoint with Gaussian noise of `level` in units of each tensor's standard deviation.

    The published similarity script does the same: it normalises a tensor by its own mean and standard
    deviation, adds `level` · N(0, 1) and denormalises. BatchNorm's `running_var` passes through
    log(v / pre_mean + 0.05) with pre_mean = 0.95 · mean(v), and back clipped at 0.001 · pre_mean, so that it
    stays positive. Integer, bool, empty and one-element tensors are left as they are.

    Args:
        state_dict: the original; not changed.
        level: 0.01 … 0.05 in the paper.
        generator: where the noise comes from (a CPU generator); the same seed gives the same copy.

    Returns:
        The same names in the same order, with the same shapes, dtypes and devices. Names that share one
        tensor (tied weights) get the same noise.
    """
    result: dict[str, Tensor] = {}
    done: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    for name, tensor in state_dict.items():
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() <= 1 or not tensor.is_floating_point():
            result[name] = tensor.clone()
        elif identity in done:
            result[name] = done[identity]
        else:
            done[identity] = result[name] = _with_noise(name, tensor, level, generator)
    return result


def _named(noised: Mapping[float, Predictions]) -> dict[str, Predictions]:
    return {f"noised at {level}": group for level, group in noised.items()}


def _within_tasks(first: Predictions, second: Predictions) -> FloatArray:
    """IoU of every pair, NaN for pairs of different tasks."""
    if not len(first.tasks) or not len(second.tasks):
        return np.full((len(first.tasks), len(second.tasks)), np.nan)
    same = np.array(first.tasks, dtype=object)[:, None] == np.array(second.tasks, dtype=object)[None, :]
    return np.where(same, wrong_iou(first.wrong, second.wrong), np.nan)


def _without_self(pairs: FloatArray) -> FloatArray:
    result = pairs.copy()
    np.fill_diagonal(result, np.nan)
    return result


def _row_maxima(pairs: FloatArray) -> FloatArray:
    maxima = np.where(np.isnan(pairs), -np.inf, pairs).max(axis=1, initial=-np.inf)
    return np.where(np.isfinite(maxima), maxima, np.nan)


def _mean(values: FloatArray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


def _with_noise(name: str, tensor: Tensor, level: float, generator: torch.Generator) -> Tensor:
    value = tensor.detach().to("cpu", torch.float32)
    noise = torch.randn(value.shape, generator=generator) * level
    pre_mean = _PRE_MEAN * value.mean()
    if name.endswith("running_var") and pre_mean > 0:
        logarithm = torch.log(value / pre_mean + _FLOOR)
        # mean + std · ((v − mean) / std + noise) is v + std · noise, also where the std is 0.
        logarithm = logarithm + logarithm.std() * noise
        value = (torch.exp(logarithm) - _FLOOR).clamp(min=_CLIP) * pre_mean
    else:
        value = value + value.std() * noise
    return value.to(tensor.device, tensor.dtype)
