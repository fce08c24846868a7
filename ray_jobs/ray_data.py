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
        The results in the order of their `index`.

    Raises:
        RPGError: the first one that a worker raised.
    """
    finished = []
    for row in _results(rows, function, False, **options):
        finished.append(row)
        on_row(row)
    return sorted(finished, key=lambda row: int(row["index"]))


def map_in_order(rows: list[Row], function: Any, **options: Any) -> Iterator[Row]:
    """Map over `rows` in parallel and yield the results one by one, in the order of `rows`.

    This is for large results: Ray Data starts no more work than it has room for results in the object store.
    The arguments and errors are those of `map_rows`.
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
    """Make a worker's function return an `RPGError` as a row, which `map_rows` and `map_in_order` raise.

    Of an exception, Ray Data would keep the text of the traceback alone.
    """

    def guarded(*arguments: Any) -> Row:
        try:
            return function(*arguments)
        except RPGError as error:
            return {"index": -1, "error": str(error)}

    return guarded
