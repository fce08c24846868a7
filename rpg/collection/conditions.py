"""Conditions of a collection's checkpoints: from a file or a pattern over file names; and their descriptions.

A pattern is a brace template such as `{index}_acc{acc}_class{class:bits10}_{rest}` or a regular expression
with named groups, where two underscores take the place of the colon: `(?P<class__bits10>[0-9]+)`. The kind
after the colon says what a field is:

| kind     | text         | gives                                                                      |
| -------- | ------------ | -------------------------------------------------------------------------- |
| `bits10` | `0314`       | condition: the number in ten bits, highest first: 0 1 0 0 1 1 1 0 1 0      |
| `digits` | `0100111010` | condition: one number a digit                                              |
| `value`  | `-0.5`       | condition: one number                                                      |
| `state`  | `2`          | the permutation state: a number that checkpoints of one data order share    |
| `metric` | `0.9613`     | a metric under the field's name; the fields `acc` and `loss` need no kind   |
| none     | `0000`       | nothing                                                                    |

Several condition fields are joined in the order of the pattern. A pattern has to match the whole name; a
template may leave out the suffix.
"""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rpg.collection.checkpoint import CHECKPOINT_SUFFIXES
from rpg.collection.collection import LARGEST_STATE
from rpg.collection.tables import Pairs, by_file, csv_table, json_table, read_table
from rpg.errors import RPGError
from rpg.storage.files import is_float32

UPSTREAM_PATTERN = r"[0-9]+_acc(?P<acc>[0-9]+(\.[0-9]+)?)_class(?P<class__bits10>[0-9]+)([_.].*)?"
"""The published model's file names, `0000_acc0.9613_class0314_….pth`: bits of CIFAR-10's classes in order."""

METRICS = ("acc", "loss")


@dataclass(frozen=True)
class NameFacts:
    """What a file's name says: its condition and permutation state, if the pattern has them, and metrics."""

    condition: list[float] | None
    metrics: dict[str, float]
    state: int | None = None


@dataclass(frozen=True)
class ConditionRow:
    """One checkpoint's condition in a conditions file; `where` names file and row for messages."""

    condition: list[float]
    where: str


@dataclass(frozen=True)
class DescriptionRow:
    """One checkpoint's description in a file; `where` names file and row for messages."""

    description: str
    where: str


class NamePattern:
    """A compiled pattern over file names."""

    def __init__(self, pattern: str) -> None:
        """Compile a template or regular expression.

        Raises:
            RPGError: naming the pattern, if it is malformed, has no named field or an unknown kind.
        """
        self.pattern = pattern
        self._regex, self._fields = _compile(pattern)
        self.has_condition = any(_is_condition(kind) for _, _, kind in self._fields)

    def read(self, name: str) -> NameFacts | None:
        """Read a file's name (its last component); None if the pattern does not match it.

        Raises:
            RPGError: naming file and field, if a field's text is not what its kind expects.
        """
        match = self._regex.fullmatch(name)
        if match is None:
            return None
        condition: list[float] = []
        metrics: dict[str, float] = {}
        state: int | None = None
        for group, field, kind in self._fields:
            text = match.group(group)
            if not kind:
                continue
            if text is None:
                raise RPGError(
                    f"{name}: pattern '{self.pattern}' found no '{field}'; expected one in every name"
                )
            if kind == "state":
                state = _state(text, f"{name}: '{field}'")
                continue
            values = _read_field(text, kind, f"{name}: '{field}'")
            if kind == "metric":
                metrics[field] = values[0]
            else:
                condition += values
        return NameFacts(condition if self.has_condition else None, metrics, state)


def bits(number: int, width: int) -> list[float]:
    """A set of `width` classes as values 0 and 1: the binary digits of `number`, first class first.

    Raises:
        RPGError: unless 1 ≤ number ≤ 2^width − 2, since a task has at least one class and leaves one out.
    """
    if not 1 <= number <= 2**width - 2:
        raise RPGError(f"class number {number}: expected 1 to {2**width - 2} for {width} classes")
    return [float(bit) for bit in format(number, f"0{width}b")]


def read_conditions(path: Path) -> dict[str, ConditionRow]:
    """Read conditions by file name from `.csv` or `.json`.

    CSV: a header `file,…` and numeric columns; a single column may instead hold the condition as bits, such
    as `0101` (every value of two or more 0s and 1s, or any value with a leading 0).
    JSON: `{file: [numbers]}` or `[{"file": …, "condition": [numbers]}]`.

    Raises:
        RPGError: naming file and row, for duplicates, values that are not finite numbers, differing widths.
    """
    text = read_table(path, "conditions")
    is_csv = path.suffix.lower() == ".csv"
    rows = by_file(
        _csv_conditions(text, path) if is_csv else _json_conditions(text, path), path, "conditions"
    )
    first = next(iter(rows.values()))
    for file, row in rows.items():
        if len(row.condition) != len(first.condition):
            raise RPGError(
                f"{row.where}: '{file}': expected {len(first.condition)} values as in {first.where}, "
                f"got {len(row.condition)}"
            )
        if not all(map(is_float32, row.condition)):
            raise RPGError(f"{row.where}: '{file}': expected values that are finite as float32")
    return rows


def read_descriptions(path: Path) -> dict[str, DescriptionRow]:
    """Read descriptions by file name from `.csv` or `.json`.

    CSV: a header `file,description`; a description with commas stands in double quotes.
    JSON: `{file: text}` or `[{"file": …, "description": text}]`.

    Raises:
        RPGError: naming file and row, for duplicates and values that are not text.
    """
    text = read_table(path, "descriptions")
    is_csv = path.suffix.lower() == ".csv"
    return by_file(
        _csv_descriptions(text, path) if is_csv else _json_descriptions(text, path), path, "descriptions"
    )


def _compile(pattern: str) -> tuple[re.Pattern[str], list[tuple[str, str, str]]]:
    """The regular expression and, for every field, its group, name and kind ("" for none)."""
    expression = pattern if "(?P<" in pattern else _template(pattern)
    try:
        regex = re.compile(expression)
    except re.error as error:
        raise RPGError(f"pattern '{pattern}': not a valid pattern: {error}") from error
    groups = []
    for group in regex.groupindex:
        name, _, kind = group.partition("__")
        if not kind and name in METRICS:
            kind = "metric"
        if kind not in ("", "metric", "state", "value", "digits") and _bit_width(kind) < 2:
            raise RPGError(
                f"pattern '{pattern}': field '{name}': unknown kind '{kind}'; "
                "expected bits2 or more, digits, value, state or metric"
            )
        groups.append((group, name, kind))
    if not groups:
        raise RPGError(
            f"pattern '{pattern}': no named field; expected one such as {{class:bits10}} or "
            "(?P<class__bits10>[0-9]+)"
        )
    return regex, groups


def _template(pattern: str) -> str:
    expression = ""
    for i, part in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        if i % 2 == 0:
            if "{" in part or "}" in part:
                raise RPGError(f"pattern '{pattern}': unmatched brace")
            expression += re.escape(part)
            continue
        field = re.fullmatch(r"([A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*)(?::([a-z]+[0-9]*))?", part)
        if field is None:
            raise RPGError(f"pattern '{pattern}': field '{{{part}}}': expected {{name}} or {{name:kind}}")
        name, kind = field.groups()
        # A number matches digits only, so the text after it belongs to the next part. Other fields match as
        # little text as possible.
        number = r"[+-]?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?"
        text = number if kind in ("value", "metric") or (not kind and name in METRICS) else ".+?"
        text = "[0-9]+" if kind and (kind in ("digits", "state") or _bit_width(kind)) else text
        expression += f"(?P<{name}{'__' + kind if kind else ''}>{text})"
    suffixes = "|".join(map(re.escape, CHECKPOINT_SUFFIXES))
    return f"{expression}(?:{suffixes})?"


def _bit_width(kind: str) -> int:
    match = re.fullmatch(r"bits([0-9]{1,4})", kind)
    return int(match.group(1)) if match else 0


def _is_condition(kind: str) -> bool:
    return kind not in ("", "metric", "state")


def _state(text: str, where: str) -> int:
    # The length is checked first, because Python takes long to read very long numbers.
    if not re.fullmatch("[0-9]{1,20}", text) or int(text) > LARGEST_STATE:
        raise RPGError(f"{where}: expected a whole number up to {LARGEST_STATE}, got '{text:.80}'")
    return int(text)


def _read_field(text: str, kind: str, where: str) -> list[float]:
    width = _bit_width(kind)
    if width or kind == "digits":
        if not re.fullmatch("[0-9]+", text):
            raise RPGError(f"{where}: expected digits, got '{text}'")
        try:
            return bits(int(text), width) if width else [float(digit) for digit in text]
        except (RPGError, ValueError) as error:
            raise RPGError(f"{where}: {error}") from error
    return [_number(text, where)]


def _csv_conditions(text: str, path: Path) -> Iterable[tuple[str, ConditionRow]]:
    header, body = csv_table(text, path)
    single = [cells[1] for _, cells in body] if len(header) == 2 else []
    are_bits = bool(single) and (
        all(re.fullmatch("[01]{2,}", cell) for cell in single)
        or any(re.fullmatch("0[01]+", cell) for cell in single)
    )
    for where, (file, *cells) in body:
        if are_bits:
            if not re.fullmatch("[01]+", cells[0]):
                raise RPGError(f"{where}: '{file}': expected bits such as 0101, got '{cells[0]}'")
            yield file, ConditionRow([float(bit) for bit in cells[0]], where)
        else:
            columns = zip(header[1:], cells, strict=True)
            values = [_number(cell, f"{where}: column '{name}'") for name, cell in columns]
            yield file, ConditionRow(values, where)


def _json_conditions(text: str, path: Path) -> Iterable[tuple[str, ConditionRow]]:
    for where, file, values in json_table(text, path, "condition", "[numbers]"):
        if not isinstance(values, list) or isinstance(values, Pairs) or not values:
            raise RPGError(f"{where}: '{file}': expected a list of numbers")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise RPGError(f"{where}: '{file}': expected numbers, got {json.dumps(value)}")
        yield file, ConditionRow([_number(value, f"{where}: '{file}'") for value in values], where)


def _csv_descriptions(text: str, path: Path) -> Iterable[tuple[str, DescriptionRow]]:
    header, body = csv_table(text, path)
    if header != ["file", "description"]:
        raise RPGError(f"{path}, row 1: expected a header 'file,description', got '{','.join(header)}'")
    for where, (file, description) in body:
        yield file, DescriptionRow(description, where)


def _json_descriptions(text: str, path: Path) -> Iterable[tuple[str, DescriptionRow]]:
    for where, file, description in json_table(text, path, "description", "text"):
        if not isinstance(description, str):
            raise RPGError(f"{where}: '{file}': expected text, got {description!r:.80}")
        yield file, DescriptionRow(description, where)


def _number(value: str | int | float, where: str) -> float:
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise RPGError(f"{where}: expected a number, got '{value}'") from error
    if not math.isfinite(number):
        raise RPGError(f"{where}: expected a finite number, got '{value}'")
    return number
