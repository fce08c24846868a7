"""Descriptions of sets of classes, written from names, training properties and facts of the classes.

A description is a request around a phrase: "Find all …", "I need a classifier for …". A phrase names classes
("cats or lorries", "everything but ships"), says a property ("things with wings"), or joins two of these
("things with wings or ponies", "animals with paws that are not dogs").
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from rpg.seeds import derived_seed
from rpg.words.facts import Fact, as_properties
from rpg.words.properties import CLASSES, Bits, ClassNames, Property

REQUESTS = (
    "{}", "{}", "{}", "select all {}", "select {}", "find all {}", "find {}", "identify all {}",
    "identify {}", "classify all {}", "classify {}", "give me a model that finds {}",
    "give me a classifier for {}", "I need a classifier for {}", "I want a network that recognises {}",
    "I would like to find {}", "please find {}", "please select all {}", "show me {}", "show me all {}",
    "pick out {}", "pick all {}", "detect {}", "detect all {}", "recognise {}", "spot {}", "keep only {}",
    "filter for {}", "search for {}", "look for {}", "images of {}", "pictures of {}",
    "photos that show {}", "all {}", "only {}", "is it one of {}?", "does the picture show {}?",
    "which images show {}?", "make a network that says yes to {}", "train a model for {}",
    "separate {} from the rest", "I am looking for {}", "get me all {}", "choose {}", "choose all {}",
    "return all {}", "tag {}", "label all {}", "a model for {}", "a detector of {}", "sort out {}",
    "collect {}",
)  # fmt: skip
"""Ways to ask; `{}` is the phrase."""

_EXCEPT = (
    "everything but {}", "everything except {}", "anything but {}", "anything other than {}", "all but {}",
    "all classes except {}", "everything that is not {}", "things that are not {}", "things other than {}",
    "not {}", "no {}", "everything apart from {}",
)  # fmt: skip
_NEITHER = ("neither {} nor {}", "things that are neither {} nor {}", "no {} and no {}")
_OR = ("{} or {}", "{} and {}", "{} as well as {}", "{}, and also {}", "either {} or {}", "{} plus {}")
_BOTH = (
    "{} that are also {}", "things that are both {} and {}", "{} which are {} at the same time",
    "{} that are {} too",
)  # fmt: skip
_WITHOUT = (
    "{} except {}", "{} but not {}", "{} that are not {}", "{}, without {}", "{} other than {}",
    "{}, but no {}", "{} apart from {}",
)  # fmt: skip
_SWAPS = (
    (r"^things\b", ("objects", "items", "stuff", "ones", "everything")),
    (r"^animals\b", ("creatures", "beasts", "any animals")),
    (r"^creatures\b", ("animals", "critters")),
    (r"^vehicles\b", ("machines", "motor vehicles", "any vehicles")),
    (r" with (an?|the) ", (" that have \\1 ", " having \\1 ", " which have \\1 ")),
    (r" that have ", (" with ", " having ", " which have ")),
)
"""Words that may be replaced without changing which classes are meant."""
_NO_ALL = r"(a|an|all|any|anything|something|every|everything|no|not|neither|either|only|whatever)\b"
"""How phrases begin that "all" cannot stand before."""
_SINGULAR = ("stuff", "everything")
_MOST_NAMED = 6
"""Larger sets are described by what they lack."""


class DescriptionWriter:
    """Writes descriptions; equal seeds give equal descriptions."""

    def __init__(
        self, names: Sequence[ClassNames], properties: Sequence[Property], facts: Sequence[Fact] = ()
    ) -> None:
        """Write with these names of the ten classes, these properties, and these facts."""
        self._names = names
        meant = [each for each in properties if any(each.bits)]
        self._sources: list[Property | Fact] = [*meant, *facts]
        self._properties = [*meant, *as_properties(facts)]
        self._by_bits: dict[Bits, list[Property]] = {}
        for each in self._properties:
            self._by_bits.setdefault(each.bits, []).append(each)

    def of_task(self, bits: Bits, number: int, seed: int) -> list[str]:
        """`number` different descriptions of one set of classes, or fewer if not so many are found.

        Half of them name classes. The others say properties that hold for exactly these classes, alone or
        joined with names of classes.
        """
        chance = random.Random(derived_seed(seed, "".join(map(str, bits)), number))
        ways: list[Callable[[Bits, random.Random], str | None]] = [self._named, self._said]
        texts: dict[str, None] = {}
        for attempt in range(20 * number):
            phrase = ways[attempt % 2](bits, chance) or self._named(bits, chance)
            texts.setdefault(_request(phrase, chance))
            if len(texts) == number:
                break
        return list(texts)

    def stream(self, seed: int) -> Iterator[tuple[str, Bits]]:
        """Endless descriptions with their bits: what the properties and facts say, alone, joined and negated,
        and lists of classes.

        Every property and fact comes up equally often.
        """
        chance = random.Random(derived_seed(seed, "descriptions", 0))
        while True:
            for each in chance.sample(self._sources, len(self._sources)):
                phrase, bits = self._mixed(each, chance)
                yield _request(phrase, chance), bits

    def sample(self, number: int, seed: int) -> list[tuple[str, Bits]]:
        """The first `number` of `stream(seed)`."""
        return list(islice(self.stream(seed), number))

    def _mixed(self, each: Property | Fact, chance: random.Random) -> tuple[str, Bits]:
        kind = chance.random()
        if kind < 0.6:
            return _say(each, chance)
        if kind < 0.75:
            size = chance.choice((1, 1, 2, 2, 2, 3, 3, 4, 5, 7, 8, 9, 9))
            chosen = set(chance.sample(range(len(CLASSES)), size))
            bits = tuple(int(i in chosen) for i in range(len(CLASSES)))
            return self._named(bits, chance), bits
        phrase, bits = _say(each, chance, negated=0.0)
        if kind < 0.81 and not all(bits):
            return chance.choice(_EXCEPT).format(phrase), tuple(1 - bit for bit in bits)
        return self._joined(phrase, bits, chance)

    def _joined(self, phrase: str, meant: Bits, chance: random.Random) -> tuple[str, Bits]:
        """A phrase joined with another one, or with the name of a class."""
        for _ in range(20):
            if chance.random() < 0.4:
                i = chance.randrange(len(CLASSES))
                other = tuple(int(i == j) for j in range(len(CLASSES)))
                text = self._name(i, chance)
            else:
                text, other = _say(chance.choice(self._sources), chance, negated=0.0)
            pairs = list(zip(meant, other, strict=True))
            forms, bits = chance.choice(
                (
                    (_OR, tuple(a | b for a, b in pairs)),
                    (_BOTH, tuple(a & b for a, b in pairs)),
                    (_WITHOUT, tuple(a & (1 - b) for a, b in pairs)),
                )
            )
            if any(bits) and bits not in (meant, other):
                return chance.choice(forms).format(phrase, text), bits
        return phrase, meant

    def _said(self, bits: Bits, chance: random.Random) -> str | None:
        """A property of exactly these classes, or with a few added or left out; None if there is none."""
        if (exact := self._by_bits.get(bits)) and chance.random() < 0.7:
            return _phrase(chance.choice(exact), chance)
        near = [
            each
            for each in self._properties
            if each.bits != bits and sum(a != b for a, b in zip(each.bits, bits, strict=True)) <= 2
        ]
        chance.shuffle(near)
        for each in near:
            more = [i for i in range(len(CLASSES)) if each.bits[i] < bits[i]]
            fewer = [i for i in range(len(CLASSES)) if each.bits[i] > bits[i]]
            if more and fewer:
                continue
            forms = _OR if more else _WITHOUT
            names = _list([self._name(i, chance) for i in more or fewer], chance)
            return chance.choice(forms).format(_phrase(each, chance), names)
        return _phrase(chance.choice(exact), chance) if exact else None

    def _named(self, bits: Bits, chance: random.Random) -> str:
        """The classes by their names, or everything but the others."""
        chosen = [i for i, bit in enumerate(bits) if bit]
        others = [i for i, bit in enumerate(bits) if not bit]
        if others and (len(chosen) > _MOST_NAMED or (len(others) <= 3 and chance.random() < 0.5)):
            chance.shuffle(others)
            names = [self._name(i, chance) for i in others]
            if len(names) == 2 and chance.random() < 0.3:
                return chance.choice(_NEITHER).format(*names)
            return chance.choice(_EXCEPT).format(_list(names, chance))
        chance.shuffle(chosen)
        if chance.random() < 0.25:
            return _list([self._a(i, chance) for i in chosen], chance)
        return _list([self._name(i, chance) for i in chosen], chance)

    def _name(self, i: int, chance: random.Random) -> str:
        """The name of a class in the plural."""
        return chance.choice(self._names[i].names).plural

    def _a(self, i: int, chance: random.Random) -> str:
        return chance.choice(self._names[i].names).with_article()


def kinds_of_classes(names: Sequence[ClassNames]) -> list[Property]:
    """Each kind of a class, such as ponies, as a property of the class."""
    return [
        Property(tuple(int(i == j) for j in range(len(CLASSES))), (kind.plural, kind.with_article()))
        for i, each in enumerate(names)
        for kind in each.kinds
    ]


def _say(each: Property | Fact, chance: random.Random, negated: float = 0.15) -> tuple[str, Bits]:
    """A phrase for a property or fact, and the classes meant; a fact is negated with the chance `negated`."""
    if isinstance(each, Fact):
        return each.said(chance, negated)
    return _phrase(each, chance), each.bits


def _phrase(each: Property, chance: random.Random) -> str:
    """One of a property's phrases, sometimes with other words of the same meaning."""
    phrase = chance.choice(each.phrases)
    pattern, words = chance.choice(_SWAPS)
    if not re.search(pattern, phrase) or chance.random() < 0.4:
        return phrase
    word = chance.choice(words)
    changed = re.sub(pattern, word, phrase, count=1)
    # "everything with wings" is singular, so a verb in the plural must not follow it.
    return (
        phrase if word in _SINGULAR and not re.match(rf"{word} (with|without|made)\b", changed) else changed
    )


def _list(names: Sequence[str], chance: random.Random) -> str:
    """Names with commas and "or" or "and" between them."""
    if len(names) == 1:
        return names[0]
    word = chance.choice(("or", "or", "and", "and", "as well as"))
    comma = "," if len(names) > 2 and chance.random() < 0.5 else ""
    if chance.random() < 0.1:
        return ", ".join(names)
    return f"{', '.join(names[:-1])}{comma} {word} {names[-1]}"


def _request(phrase: str, chance: random.Random) -> str:
    request = "{}" if chance.random() < 0.4 else chance.choice(REQUESTS)
    if re.match(_NO_ALL, phrase):
        request = request.replace("all {}", "{}")
    text = request.format(phrase)
    form = chance.random()
    if form < 0.6:
        text = text[0].upper() + text[1:]
    if form < 0.15 and not text.endswith("?"):
        text += "."
    return text
