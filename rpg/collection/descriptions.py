"""Descriptions of what a collection's checkpoints were trained for, from a CSV or JSON file."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rpg.collection.tables import by_file, csv_table, json_table, read_table
from rpg.errors import RPGError


@dataclass(frozen=True)
class DescriptionRow:
    """One checkpoint's description in a file; `where` names file and row for messages."""

    description: str
    where: str


def read_descriptions(path: Path) -> dict[str, DescriptionRow]:
    """Read descriptions by file name from `.csv` or `.json`.

    CSV: a header `file,description`; a description with commas stands in double quotes.
    JSON: `{file: text}` or `[{"file": …, "description": text}]`.

    Raises:
        RPGError: naming file and row, for duplicates and what is not text.
    """
    text = read_table(path, "descriptions")
    is_csv = path.suffix.lower() == ".csv"
    return by_file(_csv_rows(text, path) if is_csv else _json_rows(text, path), path, "descriptions")


def _csv_rows(text: str, path: Path) -> Iterable[tuple[str, DescriptionRow]]:
    header, body = csv_table(text, path)
    if header != ["file", "description"]:
        raise RPGError(f"{path}, row 1: expected a header 'file,description', got '{','.join(header)}'")
    for where, (file, description) in body:
        yield file, DescriptionRow(description, where)


def _json_rows(text: str, path: Path) -> Iterable[tuple[str, DescriptionRow]]:
    for where, file, description in json_table(text, path, "description", "text"):
        if not isinstance(description, str):
            raise RPGError(f"{where}: '{file}': expected text, got {description!r:.80}")
        yield file, DescriptionRow(description, where)
