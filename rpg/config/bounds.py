"""Bounds of a config's values: declared with the types of the fields, checked by one function.

A field says what it may hold by its type, such as `Annotated[int, Ge(1)]`. The bounds are those of the
package annotated-types, so that pydantic checks the same ones where a type is part of a request or a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, MultipleOf
from pydantic import AllowInfNan

from rpg.errors import RPGError

Finite = Annotated[float, AllowInfNan(False)]
"""Neither infinite nor NaN."""


@dataclass(frozen=True)
class Expected:
    """Words for the bounds of a field, which messages use in place of those made from the bounds."""

    text: str


Seed = Annotated[int, Interval(ge=0, lt=2**64), Expected("0 <= seed < 2**64")]

Count = Annotated[int, Ge(1)]


def check_bounds(section: Any, prefix: str = "") -> None:
    """Check every value of a dataclass, of those inside it and of those in its lists.

    Args:
        section: an instance of a dataclass whose types are annotated with bounds.
        prefix: what goes before the keys in messages, such as "generator.".

    Raises:
        RPGError: naming the key, what was expected and what was found.
    """
    for name, kind in _types(section.__class__).items():
        _check(f"{prefix}{name}", getattr(section, name), kind)


@cache
def _types(schema: type) -> dict[str, Any]:
    return get_type_hints(schema, include_extras=True)


def _check(key: str, value: Any, kind: Any) -> None:
    if value is None:
        return
    if is_dataclass(value):
        check_bounds(value, f"{key}.")
        return
    kind, metadata = _parts(kind)
    if get_origin(kind) is list:
        expected = next((each.text for each in metadata if isinstance(each, Expected)), None)
        for i, item in enumerate(value):
            if expected is None:
                _check(f"{key}[{i}]", item, get_args(kind)[0])
            elif _broken(item, *_parts(get_args(kind)[0])) is not None:
                raise RPGError(f"{key}: expected {expected}, got {value}")
    elif isinstance(value, int | float) and (broken := _broken(value, kind, metadata)) is not None:
        raise RPGError(f"{key}: expected {broken}, got {value}")


def _parts(kind: Any) -> tuple[Any, Sequence[Any]]:
    """A type without its annotations and without None, and the annotations."""
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not type(None))
    if get_origin(kind) is Annotated:
        plain, *metadata = get_args(kind)
        return plain, metadata
    return kind, ()


def _broken(value: Any, kind: Any, metadata: Sequence[Any]) -> str | None:
    """What was expected of `value`, if it breaks one of the bounds among the annotations of its type."""
    is_finite_type = kind is int or any(isinstance(m, AllowInfNan) and not m.allow_inf_nan for m in metadata)
    is_infinite = is_finite_type and isinstance(value, float) and not math.isfinite(value)
    expected = "a finite value"
    for bound in metadata:
        match bound:
            case Interval(gt=None, ge=low, lt=None, le=high) if low is not None and high is not None:
                holds, expected = low <= value <= high, f"{low} <= value <= {high}"
            case Interval(gt=None, ge=low, lt=high, le=None) if low is not None and high is not None:
                holds, expected = low <= value < high, f"{low} <= value < {high}"
            case Ge(low):
                words = "a finite value of at least" if is_finite_type else "at least"
                holds, expected = value >= low, f"{words} {low}"
            case Gt(low):
                words = "a finite value above" if is_finite_type else "above"
                holds, expected = value > low, f"{words} {low}"
            case Le(high):
                holds, expected = value <= high, f"at most {high}"
            case MultipleOf(factor):
                holds, expected = value % factor == 0, f"a multiple of {factor}"
            case _:
                continue
        if not holds or is_infinite:
            break
    else:
        if not is_infinite:
            return None
    return next((each.text for each in metadata if isinstance(each, Expected)), expected)
