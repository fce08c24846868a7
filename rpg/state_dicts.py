"""Checks that a `state_dict` can be turned into tokens and back, and its tied tensors."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rpg.errors import RPGError
from rpg.storage.files import is_storable

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
}
"""The dtypes that a state_dict may hold, by name."""

RESERVED_NAME = "__metadata__"
"""Name under which the header of a safetensors file keeps its metadata."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype as in `DTYPES`, such as `float32`."""
    return str(dtype).removeprefix("torch.")


def check_entries(state_dict: Mapping[str, Tensor]) -> None:
    """Check that a state_dict holds ordinary dense tensors only.

    Raises:
        RPGError: naming the first entry that is not a tensor, or is complex, sparse, quantized, without data,
            or of another dtype or name that has no place in a safetensors file.
    """
    for name, tensor in state_dict.items():
        if name == RESERVED_NAME or not is_storable(name):
            raise RPGError(f"tensor {name!r:.80}: .safetensors cannot store a tensor of this name")
        if not isinstance(tensor, Tensor):
            raise RPGError(f"'{name}': expected a tensor, found {type(tensor).__name__}")
        if tensor.is_quantized:
            raise RPGError(
                f"tensor '{name}': expected a dense tensor, found a quantized one: dequantise it first"
            )
        if tensor.layout != torch.strided:
            raise RPGError(f"tensor '{name}': expected a dense tensor, found a sparse one ({tensor.layout})")
        if tensor.dtype not in _KNOWN:
            raise RPGError(
                f"tensor '{name}': dtype {dtype_name(tensor.dtype)} is not supported; "
                f"expected one of {', '.join(DTYPES)}"
            )
        if tensor.is_meta:
            raise RPGError(f"tensor '{name}': expected values, found a meta tensor")


def check_structure(
    state_dict: Mapping[str, Tensor], expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
) -> None:
    """Check that a state_dict has exactly the expected names, shapes and dtypes, in any order.

    Raises:
        RPGError: naming the first tensor that is missing, unexpected or different, or that `check_entries`
            refuses.
    """
    check_entries(state_dict)
    for name, (shape, dtype) in expected.items():
        tensor = state_dict.get(name)
        if tensor is None:
            raise RPGError(f"tensor '{name}' is missing; expected {_describe(shape, dtype)}")
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise RPGError(
                f"tensor '{name}': expected {_describe(shape, dtype)}, "
                f"found {_describe(tuple(tensor.shape), tensor.dtype)}"
            )
    if len(state_dict) != len(expected):
        name = next(name for name in state_dict if name not in expected)
        raise RPGError(f"tensor '{name}' is unexpected; the layout has no tensor of that name")


def check_ties(state_dict: Mapping[str, Tensor], ties: Iterable[tuple[str, str]]) -> None:
    """Check that tied tensors hold the same values; `ties` are (alias, name of the first) pairs.

    safetensors does not store ties, so a checkpoint that it wrote can only be asked for equal values.

    Raises:
        RPGError: naming two tied tensors that differ.
    """
    for alias, first in ties:
        if not same_bits(state_dict[alias], state_dict[first]):
            raise RPGError(
                f"tensor '{alias}': expected the values of '{first}', to which it is tied, found others"
            )


def find_ties(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """The name of each tensor that shares an earlier one's memory, to the earliest one's name."""
    first_of: dict[tuple[object, ...], str] = {}
    ties = {}
    for name, tensor in state_dict.items():
        if tensor.numel() == 0:
            continue
        key = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        first = first_of.setdefault(key, name)
        if first != name:
            ties[name] = first
    return ties


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype agree in shape and in every bit (so NaN equals NaN, but 0 not -0)."""
    bits = _BITS[a.dtype.itemsize]
    return torch.equal(a.detach().view(bits), b.detach().to(a.device).view(bits))


def owned(tensor: Tensor) -> Tensor:
    """A detached contiguous copy in main memory, with a storage of its own size."""
    return tensor.detach().to("cpu").clone(memory_format=torch.contiguous_format)


def _describe(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{dtype_name(dtype)} {list(shape)}"


_KNOWN = frozenset(DTYPES.values())
