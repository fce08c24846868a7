"""Arguments that several commands take, and how their text is read."""

import argparse
import math
from pathlib import Path
from typing import TypeAlias

from upath import UPath

from rpg.config import Solver

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What argparse's `add_subparsers` returns, which commands are added to."""


def add_request_arguments(
    parser: argparse.ArgumentParser, condition_help: str, description_help: str
) -> None:
    """Declare which models are asked for: conditions or descriptions, how many of each, and the seed."""
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--condition", action="append", type=condition_text, metavar="C", help=condition_help)
    asked.add_argument("--description", action="append", metavar="TEXT", help=description_help)
    parser.add_argument(
        "--number", type=count, default=1, metavar="N", help="models for each condition (default: 1)"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="default: 0")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare how models are sampled; what is not given is None, and the generator's own setting holds."""
    parser.add_argument("--solver", choices=[solver.value for solver in Solver])
    parser.add_argument("--steps", type=count, metavar="N", help="evaluations of the denoiser")
    parser.add_argument("--temperature", type=float, metavar="T", help="scale of the starting noise")
    parser.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance; 1 is off")


def path_or_uri(text: str) -> Path | UPath:
    """The location that a user has written; a local path stays relative, so that messages show it as written.

    Raises:
        RPGError: for an invalid URI.
    """
    from rpg.storage.locations import location

    return location(text) if "://" in text else Path(text)


def condition_text(text: str) -> str:
    """Check what can be checked before the generator says how many values it takes; an argparse type."""
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
    """A condition for a generator that takes `size` values: one digit a value, or numbers with commas."""
    # Digits count as one value each even where there are too few or too many: the error about their number
    # then counts as the user did.
    if _is_digits(text) and size > 1:
        return [float(digit) for digit in text]
    return _numbers(text)


def _is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.removesuffix(",").split(",")]


def count(text: str) -> int:
    """A whole number of at least 1; an argparse type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    """A whole number of at least 0; an argparse type."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}': expected a whole number of at least 0")
    return int(text)
