"""One pass over a collection that computes what a layout needs to know about its tensors.

Passes over parts of a collection merge (Chan, Golub and LeVeque 1979, pairwise update, float64), so that
they can run on any machine and in any order. They exchange `StatisticsPart`s: sums without the reference.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rpg.collection.layout import Layout
from rpg.collection.tensor_spec import TensorKind, TensorSpec, compute_dtype
from rpg.collection.tokens import count_tokens, from_log_ratio, log_ratio
from rpg.config import Normalisation
from rpg.errors import RPGError
from rpg.state_dicts import (
    check_entries,
    check_structure,
    check_ties,
    dtype_name,
    find_ties,
    owned,
    same_bits,
)

_PRE_MEAN_SHARE = 0.95
"""pre_mean is this share of the mean running variance, as published."""
_ZSCORE_FLOOR = 0.001
"""The smallest running variance over pre_mean that decoding gives back, as published."""
_SMALLEST_MEAN = 1e-30
"""Running variances of a smaller mean cannot be divided by it in float32; they are plain weights."""
_SUMS = 6
_BLOCK = 1 << 18
"""Values per block. Their float64 copies fit into the processor's cache."""


@dataclass(frozen=True)
class StatisticsPart:
    """Statistics of some checkpoints, without the reference.

    Attributes:
        reference: digest of the reference.
        count: number of checkpoints.
        sums: float64 [floating tensors, 6]: whether the tensor has a mean, then m2, sum_mean, sum_std,
            sum_pre_mean and min_ratio.
        means: float64 [values] of each tensor that has a mean, in order; or a file that holds them one after
            the other, as `write_means` writes it.
    """

    reference: str
    count: int
    sums: npt.NDArray[np.float64]
    means: Sequence[npt.NDArray[np.float64]] | Path

    def write_means(self, path: Path) -> None:
        """Write the means to a file, without a copy in memory."""
        assert not isinstance(self.means, Path)
        with path.open("wb") as file:
            for mean in self.means:
                file.write(mean.data)


@dataclass(frozen=True)
class _StoredMean:
    """A tensor's mean in a file. Slices are read, not mapped: mapped pages count as memory of the process."""

    path: Path
    first: int
    """Number of the values before it."""

    def __getitem__(self, values: slice) -> npt.NDArray[np.float64]:
        count = values.stop - values.start
        start = (self.first + values.start) * np.dtype(np.float64).itemsize
        try:
            found = np.fromfile(self.path, np.float64, count, offset=start)
        except OSError as error:
            raise RPGError(f"{self.path}: cannot be read: {error.strerror}") from error
        if len(found) < count:
            raise RPGError(f"{self.path}: truncated; expected the means of a part of the collection")
        return found


class LayoutStatistics:
    """Running statistics of checkpoints of one architecture.

    The reference, the collection's first checkpoint, fixes names, shapes, dtypes, ties and constants; it
    counts as a checkpoint only when `update` is called with it. Statistics of the same reference merge.
    """

    def __init__(self, reference: Mapping[str, Tensor]) -> None:
        """Start with no checkpoint counted.

        Raises:
            RPGError: naming the entry of `reference` that is not an ordinary dense tensor; or if it is empty.
        """
        if not reference:
            raise RPGError("the state_dict is empty; expected at least one tensor")
        check_entries(reference)
        self.count = 0
        self.ties = find_ties(reference)
        self.reference = {name: owned(tensor) for name, tensor in reference.items() if name not in self.ties}
        self.structure = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in reference.items()}
        floating = {n: t for n, t in self.reference.items() if t.is_floating_point() and t.numel()}
        self.tensors = {
            name: _TensorStatistics.start(tensor, name.endswith("running_var"))
            for name, tensor in floating.items()
        }

    def update(self, state_dict: Mapping[str, Tensor]) -> None:
        """Count one checkpoint.

        Raises:
            RPGError: naming the tensor, if names, shapes or dtypes differ from the reference's, if tensors
                that are tied there differ, or if a running variance is negative. Nothing is counted then.
        """
        check_structure(state_dict, self.structure)
        check_ties(state_dict, self.ties.items())
        for name, statistics in self.tensors.items():
            if statistics.pre_mean is not None and bool((state_dict[name].detach() < 0).any()):
                raise RPGError(f"tensor '{name}': expected no negative running variance, found one")
        for name, statistics in self.tensors.items():
            statistics.update(state_dict[name].detach().to("cpu"), self.reference[name], self.count)
        self.count += 1

    def part(self) -> StatisticsPart:
        """The statistics so far; they share memory with this object where they can."""
        means = [each.mean.numpy() for each in self.tensors.values() if each.mean is not None]
        sums = np.array([statistics.sums() for statistics in self.tensors.values()], np.float64)
        return StatisticsPart(self._reference_digest, self.count, sums.reshape(-1, _SUMS), means)

    def merge(self, part: StatisticsPart) -> None:
        """Count all checkpoints of a part that was computed elsewhere with the same reference.

        Raises:
            RPGError: if the part was made with another reference; naming the file of its means that cannot be
                read.
        """
        if part.reference != self._reference_digest:
            raise RPGError("statistics: expected the same reference in both to merge, found another")
        held = iter(() if isinstance(part.means, Path) else part.means)
        first = 0
        for (name, statistics), (has_mean, *sums) in zip(
            self.tensors.items(), part.sums.tolist(), strict=True
        ):
            mean: npt.NDArray[np.float64] | _StoredMean | None = None
            if has_mean:
                mean = _StoredMean(part.means, first) if isinstance(part.means, Path) else next(held)
                first += statistics.size
            statistics.merge(sums, mean, self.reference[name], self.count, part.count)
        self.count += part.count

    def release_reference(self) -> None:
        """Free the reference's values that `layout` does not need. Nothing can be counted after that."""
        for name, statistics in self.tensors.items():
            if statistics.mean is not None:
                # A meta tensor has shape and dtype alone.
                self.reference[name] = self.reference[name].to("meta")

    def layout(self, token_size: int, normalisation: Normalisation) -> Layout:
        """The layout of the checkpoints counted.

        Raises:
            RPGError: if fewer than two were counted, if `token_size` is below 1, or naming the tensor whose
                values are not finite.
        """
        if token_size < 1:
            raise RPGError(f"token_size: expected at least 1, got {token_size}")
        if self.count < 2:
            raise RPGError(f"a layout needs at least 2 checkpoints, got {self.count}")
        specs: dict[str, TensorSpec] = {}
        centre: dict[str, Tensor] = {}
        next_token = 0
        for name in self.structure:
            if name in self.ties:
                first = self.ties[name]
                specs[name] = replace(
                    specs[first], name=name, alias_of=first, first_token=next_token, tokens=0
                )
                centre[name] = centre[first]
                continue
            spec, centre[name] = self._describe(name, normalisation)
            tokens = 0 if spec.kind == TensorKind.constant else count_tokens(spec.numel, token_size)
            specs[name] = replace(spec, first_token=next_token, tokens=tokens)
            next_token += tokens
        return Layout(normalisation, token_size, list(specs.values()), centre)

    @cached_property
    def _reference_digest(self) -> str:
        structure = [(name, shape, dtype_name(dtype)) for name, (shape, dtype) in self.structure.items()]
        digest = hashlib.sha256(json.dumps([structure, self.ties]).encode())
        for tensor in self.reference.values():
            if tensor.numel():
                digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _describe(self, name: str, normalisation: Normalisation) -> tuple[TensorSpec, Tensor]:
        reference = self.reference[name]
        spec = TensorSpec(name, tuple(reference.shape), reference.dtype, TensorKind.constant)
        statistics = self.tensors.get(name)
        if statistics is None:
            return spec, reference
        if normalisation == Normalisation.zscore:
            if reference.numel() == 1:
                return spec, reference
            return statistics.zscore(spec, self.count), statistics.centre(reference)
        if statistics.mean is None:
            return spec, reference
        centre = statistics.centre(reference)
        return statistics.residual(spec, centre, self.count), centre


@dataclass
class _TensorStatistics:
    """Statistics of one floating tensor. Sums are over checkpoints; T is that of `rpg.collection.tokens`."""

    size: int
    """Number of values, n."""
    pre_mean: float | None
    """For a running variance 0.95 times the reference's mean; None for plain weights."""
    reference_moments: tuple[float, float, float]
    mean: Tensor | None = None
    """Float64 [n], the mean of T over checkpoints; None as long as all have the reference's bits."""
    m2: float = 0.0
    """Sum over checkpoints and values of (T − mean)²."""
    sum_mean: float = 0.0
    """Z-score: sum of the means of each checkpoint's values; of running variances, of their log ratios."""
    sum_std: float = 0.0
    """Z-score: sum of the unbiased standard deviations of the same."""
    sum_pre_mean: float = 0.0
    min_ratio: float = math.inf
    """Smallest v / pre_mean of a running variance."""

    @classmethod
    def start(cls, reference: Tensor, may_be_variance: bool) -> "_TensorStatistics":
        flat = reference.view(-1)
        pre_mean = None
        if may_be_variance and bool((flat >= 0).all()):
            mean = _PRE_MEAN_SHARE * _moments(flat)[0]
            pre_mean = mean if _SMALLEST_MEAN <= mean < math.inf else None
        return cls(flat.numel(), pre_mean, _published_moments(flat, pre_mean is not None))

    def update(self, tensor: Tensor, reference: Tensor, count: int) -> None:
        flat = tensor.reshape(-1)
        unchanged = same_bits(tensor, reference)
        moments = self.reference_moments if unchanged else _published_moments(flat, self.pre_mean is not None)
        self._add_moments(*moments)
        if self.pre_mean is not None:
            self.min_ratio = min(self.min_ratio, float(flat.min()) / self.pre_mean)
        if unchanged and self.mean is None:
            return
        self._make_mean(reference)
        for start, values in _blocks(flat):
            self._merge_block(start, self._transform(values), count, 1)

    def sums(self) -> list[float]:
        """The tensor's row of `StatisticsPart.sums`."""
        has_mean = float(self.mean is not None)
        return [has_mean, self.m2, self.sum_mean, self.sum_std, self.sum_pre_mean, self.min_ratio]

    def merge(
        self,
        sums: list[float],
        mean: npt.NDArray[np.float64] | _StoredMean | None,
        reference: Tensor,
        count: int,
        other: int,
    ) -> None:
        """Add the statistics of `other` checkpoints to those of `count`.

        `mean` is None if all of the other checkpoints have the reference's bits.
        """
        m2, sum_mean, sum_std, sum_pre_mean, min_ratio = sums
        self._add_moments(sum_mean, sum_std, sum_pre_mean)
        self.min_ratio = min(self.min_ratio, min_ratio)
        if (self.mean is None and mean is None) or other == 0:
            return
        self._make_mean(reference)
        self.m2 += m2
        if mean is None:
            for start, values in _blocks(reference.view(-1)):
                self._merge_block(start, self._transform(values), count, other)
        else:
            for start in range(0, self.size, _BLOCK):
                values = torch.from_numpy(mean[start : min(start + _BLOCK, self.size)].copy())
                self._merge_block(start, values, count, other)

    def centre(self, reference: Tensor) -> Tensor:
        """The mean, in weight space and in the tensor's shape and dtype."""
        if self.mean is None:
            return reference
        mean = self.mean
        if self.pre_mean is not None:
            mean = from_log_ratio(mean.clone(), self.pre_mean, 0.0)
        centre = mean.reshape(reference.shape).to(reference.dtype)
        return centre.clone() if centre.data_ptr() == self.mean.data_ptr() else centre

    def zscore(self, spec: TensorSpec, count: int) -> TensorSpec:
        mean, scale = self.sum_mean / count, self.sum_std / count
        _check_is_finite(mean, spec.name)
        spec = replace(spec, kind=TensorKind.weight, mean=mean, scale=_usable(scale, spec.dtype))
        if self.pre_mean is None:
            return spec
        pre_mean = self.sum_pre_mean / count
        return replace(spec, kind=TensorKind.running_var, pre_mean=pre_mean, floor=_ZSCORE_FLOOR)

    def residual(self, spec: TensorSpec, centre: Tensor, count: int) -> TensorSpec:
        assert self.mean is not None
        # Deviations are taken from the stored centre, because in half precision its rounding can be larger
        # than the deviations from the exact mean.
        offset = 0.0
        for start, values in _blocks(centre.view(-1)):
            difference = self._transform(values).sub_(self.mean[start : start + len(values)])
            offset += float(torch.dot(difference, difference))
        _check_is_finite(offset, spec.name)
        scale = math.sqrt(self.m2 / count / spec.numel + offset / spec.numel)
        spec = replace(spec, kind=TensorKind.weight, scale=_usable(scale, spec.dtype))
        if self.pre_mean is None:
            return spec
        return replace(spec, kind=TensorKind.running_var, pre_mean=self.pre_mean, floor=self.min_ratio)

    def _transform(self, values: Tensor) -> Tensor:
        return values if self.pre_mean is None else log_ratio(values, self.pre_mean)

    def _make_mean(self, reference: Tensor) -> None:
        if self.mean is None:
            self.mean = torch.empty(self.size, dtype=torch.float64)
            for start, values in _blocks(reference.view(-1)):
                self.mean[start : start + len(values)] = self._transform(values)

    def _add_moments(self, mean: float, std: float, pre_mean: float) -> None:
        self.sum_mean += mean
        self.sum_std += std
        self.sum_pre_mean += pre_mean

    def _merge_block(self, start: int, values: Tensor, count: int, weight: int) -> None:
        assert self.mean is not None
        mean = self.mean[start : start + len(values)]
        if count == 0:
            mean.copy_(values)
            return
        difference = values - mean
        self.m2 += float(torch.dot(difference, difference)) * count * weight / (count + weight)
        mean.add_(difference, alpha=weight / (count + weight))


def _published_moments(values: Tensor, is_variance: bool) -> tuple[float, float, float]:
    """Mean and standard deviation of one checkpoint's tensor for z-score, and its pre_mean."""
    if not is_variance:
        return (*_moments(values), 1.0)
    pre_mean = _PRE_MEAN_SHARE * _moments(values)[0]
    # Variances that are all 0 cannot be divided by their mean. Their ratio to any other mean is 0.
    return (*_moments(values, pre_mean or 1.0), pre_mean)


def _moments(values: Tensor, pre_mean: float | None = None) -> tuple[float, float]:
    """Mean and unbiased standard deviation (NaN of one value); of log ratios if `pre_mean` is given."""
    count, mean, m2 = 0, 0.0, 0.0
    for _, block in _blocks(values):
        block = block if pre_mean is None else log_ratio(block, pre_mean)
        block_mean = float(block.mean())
        difference = block - block_mean
        total = count + len(block)
        m2 += float(torch.dot(difference, difference)) + (block_mean - mean) ** 2 * count * len(block) / total
        mean += (block_mean - mean) * len(block) / total
        count = total
    return mean, math.sqrt(m2 / (count - 1)) if count > 1 else math.nan


def _blocks(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, values.numel(), _BLOCK):
        yield start, values[start : start + _BLOCK].to(torch.float64, copy=True)


def _usable(scale: float, dtype: torch.dtype) -> float:
    """`scale`, or 1 if the tensor's arithmetic cannot divide by it."""
    tiny = torch.finfo(compute_dtype(dtype)).tiny
    return scale if math.isfinite(scale) and scale >= tiny else 1.0


def _check_is_finite(value: float, name: str) -> None:
    if not math.isfinite(value):
        raise RPGError(f"tensor '{name}': expected finite values in all checkpoints, found NaN or Inf")
