"""Facts about the classes, such as having wings, and the phrases that say them.

A fact has one of three forms: what things have ("wings"), what they do ("bark"), or what they are
("ungulates"). Which words stand before it is free: "things with wings", "animals that have wings", "vehicles
without wings". "Animals" and "vehicles" leave only the animals or vehicles of its classes, and "without"
those that lack it, so that one fact teaches several sets of classes.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from rpg.words.properties import CLASSES, DATA, Bits, Property, bits_of, read_table


class Form(Enum):
    """What kind of words a fact is."""

    have = "have"
    do = "do"
    are = "are"


ALL: Bits = (1,) * len(CLASSES)
VEHICLES = bits_of("airplane automobile ship truck")
ANIMALS: Bits = tuple(1 - bit for bit in VEHICLES)
_HEADS: tuple[tuple[Bits, tuple[str, ...]], ...] = (
    (ALL, ("things", "things", "things", "objects", "items", "ones", "all those")),
    (ANIMALS, ("animals", "animals", "creatures", "beasts", "critters", "beings")),
    (VEHICLES, ("vehicles", "vehicles", "machines", "means of transport")),
)
"""Words that stand before a fact, and the classes that they mean."""
_SINGULAR = {
    ALL: ("anything", "something", "everything", "a thing"),
    ANIMALS: ("an animal", "any animal", "a creature"),
    VEHICLES: ("a vehicle", "any vehicle", "a machine"),
}
_HAVE = ("with {}", "with {}", "with {}", "that have {}", "which have {}", "having {}")
_LACK = (
    "without {}", "without {}", "that have no {}", "that lack {}", "with no {}", "without any {}",
    "that don't have {}", "which do not have {}",
)  # fmt: skip
_BARE = ("no {}", "any {}", "lack {}")
"""How ways to lack end that no article can follow."""
_DO_NOT = ("do not", "do not", "don't", "never")
_NEGATIVES = {
    "can ": ("cannot ", "can't "),
    "are ": ("are not ", "aren't "),
    "were ": ("were not ", "weren't "),
}
_NEGATIVE = re.compile(
    r"(do not|cannot|never|lack|need no|seldom|have no|have neither|are not|are unable|must not)\b"
)
"""How a fact begins that is negative itself."""


@dataclass(frozen=True)
class Fact:
    """Something that holds for some of the classes, without words before it.

    Attributes:
        bits: the classes that it holds for.
        form: what kind of words `text` is.
        text: a noun, a verb in the plural with what belongs to it, or a noun that says the whole.
    """

    bits: Bits
    form: Form
    text: str

    def property(self) -> Property:
        """The fact with its plainest phrases, of which each means exactly the fact's classes."""
        if self.form is Form.are:
            return Property(self.bits, (self.text,))
        word = "with" if self.form is Form.have else "that"
        heads = [names[0] for classes, names in _HEADS if _meet(self.bits, classes) == self.bits]
        return Property(self.bits, tuple(f"{head} {word} {self.text}" for head in heads))

    def said(self, chance: random.Random, negated: float = 0.4) -> tuple[str, Bits]:
        """A phrase that says the fact, or that lacks it with the chance `negated`, and the classes meant."""
        if self.form is Form.are:
            return self.text, self.bits
        classes, names = chance.choice(_HEADS)
        lacks = chance.random() < negated
        bits = _meet(classes, tuple(1 - bit for bit in self.bits) if lacks else self.bits)
        clause = self._clause(chance, lacks)
        if not any(bits) or clause is None:
            return chance.choice(self.property().phrases), self.bits
        if clause.startswith("with") and chance.random() < 0.2:
            names = _SINGULAR[classes]
        elif not lacks and self.form is Form.have and bits == self.bits and chance.random() < 0.1:
            return self.text, bits
        return f"{chance.choice(names)} {clause}", bits

    def _clause(self, chance: random.Random, lacks: bool) -> str | None:
        """What stands behind "things"; None if the fact cannot be negated in simple words."""
        if self.form is Form.have:
            clause = chance.choice(_LACK if lacks else _HAVE)
            bare = clause.endswith(_BARE)
            return clause.format(re.sub(r"^(an?|the) ", "", self.text) if bare else self.text)
        word = chance.choice(("that", "that", "which"))
        if not lacks:
            return f"{word} {self.text}"
        if _NEGATIVE.match(self.text):
            return None
        for verb, negatives in _NEGATIVES.items():
            if self.text.startswith(verb):
                return f"{word} {chance.choice(negatives)}{self.text.removeprefix(verb)}"
        return f"{word} {chance.choice(_DO_NOT)} {self.text}"


def facts() -> tuple[Fact, ...]:
    """The facts to learn from."""
    return tuple(
        Fact(bits_of(each["classes"]), form, text)
        for each in read_table(DATA / "facts_training.yaml")
        for form in Form
        for text in each.get(form.value, ())
    )


def as_properties(table: Sequence[Fact]) -> list[Property]:
    """Each fact with its plainest phrases."""
    return [each.property() for each in table]


def _meet(first: Bits, second: Bits) -> Bits:
    return tuple(a & b for a, b in zip(first, second, strict=True))
