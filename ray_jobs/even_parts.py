"""Work cut into parts of nearly the same size, for Ray's tasks and workers."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def evenly(items: Sequence[T], most: int, workers: int = 1) -> list[Sequence[T]]:
    """Cut `items` into parts of at most `most`, as many for each of `workers`, of nearly the same size."""
    parts = min(-(-len(items) // (most * workers)) * workers, len(items))
    return [items[len(items) * i // parts : len(items) * (i + 1) // parts] for i in range(parts)]
