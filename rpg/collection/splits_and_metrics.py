"""Splits and metrics of a folder's checkpoints, as a user gives them: patterns, lists and tables."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from rpg.collection.collection import SPLITS
from rpg.collection.tables import Pairs, by_file, check_known_files, csv_table, json_table, read_table
from rpg.errors import RPGError
from rpg.storage.files import is_number


@dataclass(frozen=True)
class SplitRow:
    """The split of one checkpoint; `where` names file and row for messages."""

    split: str
    where: str


@dataclass(frozen=True)
class MetricsRow:
    """The metrics of one checkpoint; `where` names file and row for messages."""

    metrics: dict[str, float]
    where: str


def read_splits(choices: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The split of every checkpoint that one of the `choices` is about.

    Args:
        choices: each `SPLIT=PATTERN` with a pattern over names as in a shell; `SPLIT=FILE.txt` with a list of
            names, one a line; or `FILE.csv` with a header `file,split`, of which `SPLIT=FILE.csv` takes the
            rows of one split.
        names: of the checkpoints.

    Raises:
        RPGError: naming the choice that is malformed or about no checkpoint, the file or row that is wrong,
            or the checkpoint that two choices put into different splits.
    """
    found: dict[str, SplitRow] = {}
    for choice in choices:
        rows = dict(_chosen(choice, names))
        if not rows:
            raise RPGError(f"--split {choice}: matches no checkpoint of the folder")
        for name, row in rows.items():
            if name in found and found[name].split != row.split:
                raise RPGError(
                    f"{row.where}: '{name}' is in {row.split}, and in {found[name].split} by "
                    f"{found[name].where}; expected one split"
                )
        found |= rows
    return {name: row.split for name, row in found.items()}


def read_metrics(path: Path, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Metrics by file name from `.csv` or `.json`; checkpoints may be without any.

    CSV: a header `file,…` that names the metrics; a cell may be empty.
    JSON: `{file: {metric: number}}` or `[{"file": …, "metrics": {metric: number}}]`.

    Raises:
        RPGError: naming file and row, for duplicates, unknown checkpoints and values that are not finite.
    """
    text = read_table(path, "metrics")
    rows = _csv_metrics(text, path) if path.suffix.lower() == ".csv" else _json_metrics(text, path)
    table = by_file(rows, path, "metrics")
    check_known_files(table, names)
    return {name: row.metrics for name, row in table.items()}


def _chosen(choice: str, names: Sequence[str]) -> Iterator[tuple[str, SplitRow]]:
    split, equals, value = choice.partition("=")
    where = f"--split {choice}"
    if not equals and choice.lower().endswith(".csv"):
        split, value = "", choice
    elif split not in SPLITS or not value:
        raise RPGError(
            f"{where}: expected {'|'.join(SPLITS)}=PATTERN, a list of names as SPLIT=FILE.txt, or FILE.csv"
        )
    if value.lower().endswith(".csv"):
        rows = by_file(_csv_splits(Path(value)), Path(value), "splits")
        check_known_files(rows, names)
        yield from ((name, row) for name, row in rows.items() if row.split == split or not split)
    elif value.lower().endswith(".txt"):
        listed = by_file(_listed(Path(value), split), Path(value), "names")
        check_known_files(listed, names)
        yield from listed.items()
    else:
        yield from ((name, SplitRow(split, where)) for name in names if fnmatchcase(name, value))


def _listed(path: Path, split: str) -> Iterator[tuple[str, SplitRow]]:
    text = read_table(path, "names of checkpoints", (".txt",))
    for i, line in enumerate(text.splitlines(), start=1):
        if name := line.strip():
            yield name, SplitRow(split, f"{path}, row {i}")


def _csv_splits(path: Path) -> Iterator[tuple[str, SplitRow]]:
    header, body = csv_table(read_table(path, "splits"), path)
    if header != ["file", "split"]:
        raise RPGError(f"{path}, row 1: expected a header 'file,split', got '{','.join(header)}'")
    for where, (name, split) in body:
        if split not in SPLITS:
            raise RPGError(f"{where}: '{name}': expected one of {', '.join(SPLITS)}, got '{split}'")
        yield name, SplitRow(split, where)


def _csv_metrics(text: str, path: Path) -> Iterator[tuple[str, MetricsRow]]:
    (_, *metrics), body = csv_table(text, path)
    if "" in metrics or len(set(metrics)) < len(metrics):
        raise RPGError(f"{path}, row 1: expected metrics of different names in the header")
    for where, (name, *cells) in body:
        values = {metric: cell for metric, cell in zip(metrics, cells, strict=True) if cell}
        yield name, _metrics_row(name, values.items(), where)


def _json_metrics(text: str, path: Path) -> Iterator[tuple[str, MetricsRow]]:
    for where, name, value in json_table(text, path, "metrics", "{metric: number}"):
        if not isinstance(value, Pairs):
            raise RPGError(f"{where}: '{name}': expected metrics as {{metric: number}}")
        yield name, _metrics_row(name, value, where)


def _metrics_row(name: str, values: Iterable[tuple[str, Any]], where: str) -> MetricsRow:
    found: dict[str, float] = {}
    for metric, value in values:
        try:
            number = float(value) if isinstance(value, str) else value
        except ValueError:
            number = value
        if not is_number(number):
            raise RPGError(f"{where}: '{name}': {metric}: expected a finite number, got {value!r:.80}")
        if metric in found:
            raise RPGError(f"{where}: '{name}': {metric} is given twice")
        found[metric] = number
    return MetricsRow(found, where)
