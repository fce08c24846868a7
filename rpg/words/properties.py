"""The hand-written tables of `data/`: properties of the classes, names of the classes, other texts."""

from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rpg.errors import RPGError, one_line

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""CIFAR-10's classes in the order of its labels."""
DATA = Path(__file__).parent / "data"
OTHER_THINGS = "other_things"
"""The kind of texts out of scope that ask for things that are none of the classes."""
Bits = tuple[int, ...]
"""For each class 1 if it is meant, else 0."""


class Part(Enum):
    """What a part of the tables is for."""

    training = "training"
    validation = "validation"
    test = "test"


@dataclass(frozen=True)
class Property:
    """Something that holds for some of the classes, and phrases in the plural that say it."""

    bits: Bits
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class Name:
    """What people call a class, or a kind of it."""

    singular: str
    plural: str

    def with_article(self) -> str:
        """The singular behind "a" or "an"."""
        return f"{'an' if self.singular[0].lower() in 'aeio' else 'a'} {self.singular}"


@dataclass(frozen=True)
class ClassNames:
    """The names of one class: `names` mean all of it, `kinds` are kinds of it."""

    names: tuple[Name, ...]
    kinds: tuple[Name, ...]


def bits_of(classes: str) -> Bits:
    """The bits of class names with spaces between them; `all` are all ten.

    Raises:
        RPGError: naming what is no class.
    """
    words = CLASSES if classes == "all" else classes.split()
    for word in words:
        if word not in CLASSES:
            raise RPGError(f"expected names of CIFAR-10's classes, got {word!r}")
    return tuple(int(name in words) for name in CLASSES)


@cache
def properties(part: Part) -> tuple[Property, ...]:
    """The properties of one part of the table."""
    path = DATA / f"properties_{part.value}.yaml"
    return tuple(Property(bits_of(each["classes"]), tuple(each["phrases"])) for each in read_table(path))


@cache
def class_names() -> tuple[ClassNames, ...]:
    """The names of every class, in the order of `CLASSES`."""
    tables = read_table(DATA / "class_names.yaml")

    def names(entries: list[str]) -> tuple[Name, ...]:
        return tuple(Name(*entry.split("/")) for entry in entries)

    return tuple(ClassNames(names(tables[each]["names"]), names(tables[each]["kinds"])) for each in CLASSES)


@cache
def out_of_scope(part: Part) -> dict[str, tuple[str, ...]]:
    """Texts that describe none of the classes, by kind, such as nonsense or other languages."""
    kinds = read_table(DATA / "out_of_scope.yaml")[part.value]
    return {kind: tuple(texts) for kind, texts in kinds.items()}


@cache
def published() -> tuple[tuple[str, Bits], ...]:
    """The published descriptions and their bits, which nothing is trained on or chosen by."""
    entries = read_table(DATA / "published.yaml")
    return tuple((each["description"], tuple(each["expected"])) for each in entries)


def read_table(path: Path) -> Any:
    """What a table of `data/` holds.

    Raises:
        RPGError: naming the file, if it cannot be read.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RPGError(f"{path}: cannot be read: {one_line(error)}") from error
