"""The published code's `structure.cache`: what its tensors are and how they are normalised, as a layout.

The file is a plain pickle of {"structure": {name: entry}, "checkpoint_list": [...]}. An entry is (shape,
mean, standard deviation); for a running variance (shape, mean of the variances · 0.95, mean and standard
deviation of log(v / that + 0.05)); and (shape, value, None) for a tensor that is no token. Each number is the
mean over the training checkpoints. Source: github.com/NUS-HPC-AI-Lab/Recurrent-Parameter-Generation.
"""

import io
import math
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rpg.collection.layout import Layout, placed, total_tokens
from rpg.collection.tensor_spec import TensorKind, TensorSpec
from rpg.collection.tokens import LOG_SHIFT
from rpg.config import Normalisation, TokenCut
from rpg.errors import RPGError, one_line
from rpg.state_dicts import DTYPES
from rpg.storage.below import read_regular
from rpg.storage.locations import AnyPath, fetched

_MOST_BYTES = 2**30
_FLOOR = 0.001
"""Smallest running variance, as a share of `pre_mean`, that the published code restores."""


def read_structure(path: AnyPath) -> dict[str, tuple[TensorSpec, Tensor]]:
    """Read a structure cache without executing it.

    Returns:
        By name and in order, each tensor's spec, not yet cut into tokens, and the value of a constant; for
        others the value is a 0-d tensor, the mean weight.

    Raises:
        RPGError: naming the file, and the tensor whose entry is not as the published code writes it.
    """
    with fetched(path) as local:
        try:
            content = read_regular(local, _MOST_BYTES)
        except OSError as error:
            raise RPGError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        found = _StructureUnpickler(io.BytesIO(content)).load()
    except RPGError as error:
        raise RPGError(f"{path}: {error}") from error
    except Exception as error:  # A damaged pickle raises anything.
        raise RPGError(f"{path}: not a structure cache: {one_line(error)}") from error
    structure = found.get("structure") if isinstance(found, dict) else None
    if not isinstance(structure, dict) or not structure:
        raise RPGError(f"{path}: expected a structure cache, a mapping with the key 'structure'")
    result = {}
    for name, entry in structure.items():
        if not isinstance(name, str):
            raise RPGError(f"{path}: structure: expected names of tensors, found {name!r:.80}")
        try:
            result[name] = _described(name, entry)
        except _WrongEntryError as error:
            raise RPGError(f"{path}: tensor '{name}': {error}") from error
    return result


def layout_of(structure: dict[str, tuple[TensorSpec, Tensor]], token_size: int, tokens: int) -> Layout | None:
    """The layout of a structure that `read_structure` returned, cut into `tokens` of `token_size` values.

    The cache does not say how tokens are cut: they are cut by tensor, unless only another cut makes as many.
    It has no mean checkpoint either. Every weight of the layout's centre is its tensor's mean.

    Returns:
        None if no cut makes `tokens` tokens.
    """
    specs = [spec for spec, _ in structure.values()]
    for cut in (TokenCut.by_tensor, TokenCut.flat, TokenCut.by_output_channel):
        cut_specs = placed(specs, token_size, cut)
        if total_tokens(cut_specs, token_size, cut) == tokens:
            break
    else:
        return None
    centre = {
        spec.name: value if spec.kind == TensorKind.constant else torch.full(spec.shape, float(value))
        for spec, value in structure.values()
    }
    return Layout(Normalisation.zscore, token_size, cut_specs, centre, cut)


class _WrongEntryError(Exception):
    """Says what was expected of an entry."""


def _described(name: str, entry: Any) -> tuple[TensorSpec, Tensor]:
    numbers = 4 if "running_var" in name else 3
    if not isinstance(entry, tuple) or len(entry) not in (3, numbers):
        raise _WrongEntryError(f"expected {numbers} values, found {entry!r:.80}")
    shape = entry[0]
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise _WrongEntryError(f"expected a shape, found {shape!r:.80}")
    if entry[-1] is None:
        value = entry[1]
        if not isinstance(value, Tensor) or value.shape != shape or value.dtype not in DTYPES.values():
            raise _WrongEntryError(f"expected its value, of shape {list(shape)}, found {value!r:.80}")
        spec = TensorSpec(name, tuple(shape), value.dtype, TensorKind.constant)
        return spec, value.detach().clone(memory_format=torch.contiguous_format)
    if len(entry) != numbers:
        raise _WrongEntryError(f"expected {numbers} values, found {len(entry)}")
    if not math.prod(shape):
        raise _WrongEntryError(f"expected values, found the shape {list(shape)}")
    *before, mean, scale = [_number(value) for value in entry[1:]]
    if scale <= 0:
        raise _WrongEntryError(f"expected a standard deviation above 0, found {scale:g}")
    if not before:
        return (
            TensorSpec(name, tuple(shape), torch.float32, TensorKind.weight, mean=mean, scale=scale),
            torch.tensor(mean),
        )
    (pre_mean,) = before
    if pre_mean <= 0:
        raise _WrongEntryError(f"expected a mean variance above 0, found {pre_mean:g}")
    spec = TensorSpec(
        name, tuple(shape), torch.float32, TensorKind.running_var,
        mean=mean, scale=scale, pre_mean=pre_mean, floor=_FLOOR,
    )  # fmt: skip
    return spec, torch.tensor(max(math.exp(mean) - LOG_SHIFT, _FLOOR) * pre_mean)


def _number(value: Any) -> float:
    is_number = type(value) in (int, float) or (
        isinstance(value, Tensor) and value.numel() == 1 and value.dtype.is_floating_point
    )
    if not is_number or not math.isfinite(value):
        raise _WrongEntryError(f"expected finite numbers, found {value!r:.80}")
    return float(value)


def _shape(sizes: Any = ()) -> tuple[int, ...]:
    return tuple(sizes)


def _storage(content: Any) -> Any:
    # A tensor in a plain pickle keeps its values as a file of their own, which is read like a checkpoint.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a damaged file's version
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch", "Size"): _shape,
    ("torch.storage", "_load_from_bytes"): _storage,
    # PyTorch's own reader allows these two as well.
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("collections", "OrderedDict"): OrderedDict,
}


class _StructureUnpickler(pickle.Unpickler):
    """Makes numbers, texts, containers and tensors, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for `module.name` in the pickle."""
        if (module, name) not in _ALLOWED:
            raise RPGError(
                f"holds '{module}.{name}', which a structure cache does not need; RPG never executes a pickle"
            )
        return _ALLOWED[module, name]
