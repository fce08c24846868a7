"""What a layout knows about one tensor."""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from rpg.errors import RPGError
from rpg.state_dicts import DTYPES, dtype_name
from rpg.storage.files import is_number


class TensorKind(StrEnum):
    """How a tensor is turned into token values."""

    weight = "weight"
    """Normalised without a transformation."""
    running_var = "running_var"
    """A BatchNorm variance: normalised after log(v / pre_mean + 0.05)."""
    constant = "constant"
    """Not turned into tokens: integer, bool and empty tensors, and floats that all checkpoints agree on."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layout.

    `mean` and `scale` are those of the (transformed) values: token value = (T(w) − offset) / scale, where the
    offset is `mean` for z-score and T(centre) for residual. Only `TensorKind.running_var` uses `pre_mean` and
    `floor`. Tokens `first_token` … `first_token + tokens − 1` hold the tensor; a
    constant or a tied tensor (`alias_of`) has none.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: TensorKind
    alias_of: str | None = None
    mean: float = 0.0
    scale: float = 1.0
    pre_mean: float = 1.0
    floor: float = 0.0
    first_token: int = 0
    tokens: int = 0

    @property
    def numel(self) -> int:
        """Number of values; 1 for a 0-d tensor."""
        return math.prod(self.shape)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype that values are normalised in."""
        return compute_dtype(self.dtype)

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values; `spec_from_json` reads them back exactly."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": dtype_name(self.dtype),
            "kind": self.kind.value,
            "alias_of": self.alias_of,
            "mean": self.mean,
            "scale": self.scale,
            "pre_mean": self.pre_mean,
            "floor": self.floor,
            "first_token": self.first_token,
            "tokens": self.tokens,
        }


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that floating values are normalised in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spec_from_json(value: Any, source: str) -> TensorSpec:
    """Read what `TensorSpec.to_json` wrote; `source` names the file in messages.

    Raises:
        RPGError: naming the file and the key that is missing, unknown or of the wrong type.
    """
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise RPGError(f"{source}: expected each tensor to be a mapping with a 'name', found {value!r:.80}")
    name = value["name"]
    for key, valid in _VALID.items():
        if key not in value:
            raise RPGError(f"{source}: tensor '{name}' has no '{key}'")
        if not valid(value[key]):
            raise RPGError(f"{source}: tensor '{name}': '{key}' is not valid: {value[key]!r:.80}")
    for key in value:
        if key not in _VALID:
            raise RPGError(f"{source}: tensor '{name}' has an unknown key '{key}'")
    return TensorSpec(
        name=name,
        shape=tuple(value["shape"]),
        dtype=DTYPES[value["dtype"]],
        kind=TensorKind(value["kind"]),
        alias_of=value["alias_of"],
        mean=float(value["mean"]),
        scale=float(value["scale"]),
        pre_mean=float(value["pre_mean"]),
        floor=float(value["floor"]),
        first_token=value["first_token"],
        tokens=value["tokens"],
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


_VALID = {
    "name": lambda value: isinstance(value, str),
    "shape": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "dtype": lambda value: isinstance(value, str) and value in DTYPES,
    "kind": lambda value: isinstance(value, str) and value in list(TensorKind),
    "alias_of": lambda value: value is None or isinstance(value, str),
    "mean": is_number,
    "scale": lambda value: is_number(value) and value > 0,
    "pre_mean": lambda value: is_number(value) and value > 0,
    "floor": lambda value: is_number(value) and value >= 0,
    "first_token": _is_count,
    "tokens": _is_count,
}
