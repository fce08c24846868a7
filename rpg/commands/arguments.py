"""What commands take for arguments, as functions for argparse: they say what they expected."""

import argparse
import math


def condition_text(text: str) -> str:
    """Check what can be checked before the generator says how many values it takes."""
    try:
        values = [*map(float, text)] if _is_digits(text) else _numbers(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}': expected digits such as 0101010101, or numbers with commas"
        ) from None
    if not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(f"'{text}': expected finite numbers")
    return text


def condition_values(text: str, size: int) -> list[float]:
    """A condition for a generator that takes `size` values: as many digits, or numbers with commas."""
    # Too few or too many digits stay digits: whoever refuses them counts values as the user did.
    if _is_digits(text) and size > 1:
        return [float(digit) for digit in text]
    return _numbers(text)


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.removesuffix(",").split(",")]


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number of at least 0")
    return int(text)
