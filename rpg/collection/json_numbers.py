"""Which numbers of a JSON file can be used: its integers have no bounds, and bool counts as int in Python."""

import sys
from typing import Any

import torch


def is_number(value: Any) -> bool:
    """Whether `value` is a number, not a bool, that is finite as float64."""
    # Not math.isfinite: it fails on integers beyond the floats.
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def is_float32(value: Any) -> bool:
    """Whether `value` is a number, not a bool, that is finite as float32."""
    return is_number(value) and abs(value) <= torch.finfo(torch.float32).max
