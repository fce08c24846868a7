"""Tables about checkpoints: CSV or JSON with a row for each file name."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from rpg.errors import RPGError
from rpg.storage.below import read_regular

SUFFIXES = (".csv", ".json")
_MOST_BYTES = 2**28


class Located(Protocol):
    """A row about one checkpoint."""

    @property
    def where(self) -> str:
        """File and row, for messages."""
        ...


R = TypeVar("R", bound=Located)


class CsvTable(NamedTuple):
    """A CSV file's header, and its rows as (where, cells); `where` names file and row for messages."""

    header: list[str]
    rows: list[tuple[str, list[str]]]


class Pairs(list[tuple[str, Any]]):
    """The keys and values of a JSON object, with duplicate keys."""


def read_table(path: Path, what: str, suffixes: Sequence[str] = SUFFIXES) -> str:
    """The text of a file with one of the suffixes; `what` says in messages what it holds.

    Raises:
        RPGError: naming the file, if it has another suffix, is missing or is not text.
    """
    expected = f"expected {what} as {' or '.join(suffixes)}"
    if path.suffix.lower() not in suffixes:
        raise RPGError(f"{path}: {expected}")
    try:
        # Spreadsheets often begin a CSV with a byte-order mark, which utf-8-sig skips.
        text = read_regular(path, _MOST_BYTES).decode("utf-8-sig")
        return text.replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found; {expected}") from error
    except UnicodeDecodeError as error:
        raise RPGError(f"{path}: not UTF-8 text; {expected}") from error
    except OSError as error:
        raise RPGError(f"{path}: cannot be read: {error.strerror}") from error


def csv_table(text: str, path: Path) -> CsvTable:
    """Parse a CSV table whose first column is `file`; blanks around cells and empty lines are dropped.

    Raises:
        RPGError: naming the row that is not valid CSV, has no file name, or not as many cells as the header.
    """
    reader = csv.reader(io.StringIO(text), strict=True)
    rows: list[tuple[str, list[str]]] = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                rows.append((f"{path}, row {reader.line_num}", cells))
    except csv.Error as error:
        raise RPGError(f"{path}, row {reader.line_num}: not valid CSV: {error}") from error
    if not rows or rows[0][1][0] != "file" or len(rows[0][1]) < 2:
        raise RPGError(f"{path}, row 1: expected a header 'file,...' with at least one column of values")
    (_, header), *body = rows
    for where, cells in body:
        if len(cells) != len(header):
            raise RPGError(f"{where}: expected {len(header)} cells as in the header, got {len(cells)}")
        if not cells[0]:
            raise RPGError(f"{where}: expected a file name")
    return CsvTable(header, body)


def json_table(text: str, path: Path, key: str, form: str) -> Iterator[tuple[str, str, Any]]:
    """Parse `{file: value}` or `[{"file": …, key: value}]`: (where, file, value) of every row.

    `form` says in messages what a value is, such as `[numbers]`.

    Raises:
        RPGError: naming the row that has another form.
    """
    try:
        # A dict would silently keep the last of two equal keys.
        content = json.loads(text, object_pairs_hook=Pairs)
    except (ValueError, RecursionError) as error:
        raise RPGError(f"{path}: not valid JSON: {error}") from error
    if isinstance(content, Pairs):
        items: list[tuple[Any, Any]] = list(content)
    elif isinstance(content, list):
        items = []
        for i, item in enumerate(content, start=1):
            if not isinstance(item, Pairs) or sorted(name for name, _ in item) != sorted(["file", key]):
                raise RPGError(f'{path}, row {i}: expected {{"file": ..., "{key}": {form}}}')
            keyed = dict(item)
            items.append((keyed["file"], keyed[key]))
    else:
        raise RPGError(f"{path}: expected {{file: {form}}} or a list of file and {key}")
    for i, (file, value) in enumerate(items, start=1):
        where = f"{path}, row {i}"
        if not isinstance(file, str) or not file:
            raise RPGError(f"{where}: file: expected text, got {file!r}")
        yield where, file, value


def by_file(rows: Iterable[tuple[str, R]], path: Path, what: str) -> dict[str, R]:
    """The rows by file name; `what` says in messages what the file holds.

    Raises:
        RPGError: naming the row of a file that is listed twice; if there are no rows.
    """
    found: dict[str, R] = {}
    for file, row in rows:
        if file in found:
            raise RPGError(f"{row.where}: '{file}' is listed twice, first in {found[file].where}")
        found[file] = row
    if not found:
        raise RPGError(f"{path}: holds no {what}")
    return found


def check_files(rows: Mapping[str, Located], files: Sequence[str], source: Path, what: str) -> None:
    """Check that a table and a folder of checkpoints name the same files; `what` says what a row holds.

    Raises:
        RPGError: naming the row whose file is missing, or the checkpoint without a row.
    """
    check_known_files(rows, files)
    for file in files:
        if file not in rows:
            raise RPGError(f"{source}: no row for '{file}'; expected a {what} for every checkpoint")


def check_known_files(rows: Mapping[str, Located], files: Sequence[str]) -> None:
    """Check that a table names checkpoints of the folder only, but maybe not all.

    Raises:
        RPGError: naming the row whose file is missing.
    """
    known = set(files)
    for file, row in rows.items():
        if file not in known:
            raise RPGError(f"{row.where}: '{file}' is not among the checkpoints of the folder")
