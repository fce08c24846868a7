"""Running a function over rows with Ray Data, one block a row.

A worker or a node that dies costs a retry: Ray Data repeats a map task without limit, and makes a block that
was lost with its node again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import ray.data

from rpg.errors import RPGError

Row = dict[str, Any]


def map_rows(rows: list[Row], function: Any, on_row: Callable[[Row], None], **options: Any) -> list[Row]:
    """Map over `rows` in parallel.

    Args:
        rows: each has a key `index`, which the results must keep.
        function: as Ray Data's `map` takes it: a function of a row, or an actor class; made with
            `returns_errors`.
        on_row: called with every finished row, in the order in which they finish.
        options: of Ray Data's `map`.

    Returns:
        The results by `index`, in whatever order they finished.

    Raises:
        RPGError: the first that a worker met.
    """
    finished = []
    for row in _results(rows, function, False, **options):
        finished.append(row)
        on_row(row)
    return sorted(finished, key=lambda row: int(row["index"]))


def map_in_order(rows: list[Row], function: Any, **options: Any) -> Iterator[Row]:
    """As `map_rows`, but results come one by one, in the order of `rows`: for results that are large.

    Ray Data starts no more work than it has room for results in the object store.
    """
    return _results(rows, function, True, **options)


def _results(rows: list[Row], function: Any, in_order: bool, **options: Any) -> Iterator[Row]:
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    data.context.execution_options.preserve_order = in_order
    for row in data.map(function, **options).iter_rows():
        if "error" in row:
            raise RPGError(row["error"])
        yield row


def returns_errors(function: Callable[..., Row]) -> Callable[..., Row]:
    """A worker's errors come back as rows: of exceptions, Ray Data keeps the text alone, with its trace."""

    def guarded(*arguments: Any) -> Row:
        try:
            return function(*arguments)
        except RPGError as error:
            return {"index": -1, "error": str(error)}

    return guarded
