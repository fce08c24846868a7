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
from rpg.words.facts import ANIMALS, VEHICLES, Fact, as_properties
from rpg.words.properties import CLASSES, Bits, ClassNames, Name, Property

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
    "collect {}", "{} please", "{}, please", "just {}", "{} only", "I only want {}", "I'd like to see {}",
    "help me find {}", "can you find {}?", "could you pick out {}?", "tell me which ones are {}",
    "which of these are {}?", "my photos of {}", "I want to know which pictures show {}", "{} or not?",
    "{} vs everything else", "{} vs. the rest", "{} versus everything else", "{} versus all others",
    "{} against the rest", "tell {} apart from the rest",
)  # fmt: skip
"""Ways to ask; `{}` is the phrase."""
_OF_ONE = (
    "is there {} in my picture?", "is there {} in this photo?", "is this {}?", "is it {}?", "{}?",
    "do you see {}?", "can you see {} here?", "does my picture have {} in it?", "does this show {}?",
    "I want to know if there's {} in my picture", "tell me if there is {} in the image",
    "I want to know whether it is {}", "check for {}",
)  # fmt: skip
"""More ways, for a phrase that begins with "a" or "an"."""
_OF_MANY = (
    "are there {} in my picture?", "are there any {} in this photo?", "are these {}?", "any {}?", "{}?",
    "do you see {}?", "does my picture have {} in it?", "I want to know if there are {} in my picture",
    "tell me if there are {} in the image", "check for {}",
)  # fmt: skip
"""More ways, for a phrase in the plural."""

_EXCEPT = (
    "everything but {}", "everything except {}", "anything but {}", "anything other than {}", "all but {}",
    "all classes except {}", "everything that is not {}", "things that are not {}", "things other than {}",
    "not {}", "no {}", "everything apart from {}", "everything excluding {}", "everything minus {}",
    "everything except for {}", "all except {}", "anything that isn't {}", "anything that is not {}",
    "anything which isn't {}", "things that aren't {}", "whatever is not {}", "everything without {}",
    "everything leaving out {}", "all without any {}", "pictures without any {}", "the opposite of {}",
)  # fmt: skip
_EXCLUDE = (
    "exclude {}", "exclude all {}", "excluding {}", "leave out {}", "ignore {}", "filter out {}", "remove {}",
    "I don't want {}", "I do not want any {}", "don't show {}", "do not select {}", "without {}",
)  # fmt: skip
"""Whole sentences that mean everything but the phrase."""
_NON = "non-{}"
_NEITHER = ("neither {} nor {}", "things that are neither {} nor {}", "no {} and no {}")
_OR = ("{} or {}", "{} and {}", "{} as well as {}", "{}, and also {}", "either {} or {}", "{} plus {}")
_BOTH = (
    "{} that are also {}", "things that are both {} and {}", "{} which are {} at the same time",
    "{} that are {} too",
)  # fmt: skip
_WITHOUT = (
    "{} except {}", "{} but not {}", "{} that are not {}", "{}, without {}", "{} other than {}",
    "{}, but no {}", "{} apart from {}", "{}, no {}", "{} but no {}", "{} and no {}", "{}, not {}",
    "{} minus {}", "{} excluding {}", "{}, excluding {}", "{}, leaving out {}", "{} that aren't {}",
    "{} which aren't {}", "{} without any {}", "{} except for {}", "{}, except {}",
)  # fmt: skip
_ONLY_PLURAL = ("no {}", "any {}", "all {}", _NON)
"""How forms end that "a" or "an" cannot follow."""
_SWAPS = (
    (r"^things\b", ("objects", "items", "stuff", "ones", "everything")),
    (r"^animals\b", ("creatures", "beasts", "any animals")),
    (r"^creatures\b", ("animals", "critters")),
    (r"^vehicles\b", ("machines", "motor vehicles", "any vehicles")),
    (r" with (an?|the) ", (" that have \\1 ", " having \\1 ", " which have \\1 ")),
    (r" that have ", (" with ", " having ", " which have ")),
)
"""Words that may be replaced without changing which classes are meant."""
_NO_ALL = (
    r"(a|an|all|any|anything|something|every|everything|no|not|non|neither|either|only|whatever|pictures|"
    r"the opposite)\b"
)
"""How phrases begin that "all" cannot stand before."""
_WHOLE = tuple(form.partition("{}")[0] for form in _EXCLUDE)
_SINGULAR = ("stuff", "everything")
_KINDS = (
    (ANIMALS, tuple(Name(each, each + "s") for each in ("animal", "animal", "creature"))),
    (VEHICLES, tuple(Name(each, each + "s") for each in ("vehicle", "vehicle", "machine"))),
)
"""Words for several classes, which are listed like names."""
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
            texts.setdefault(asked(phrase, chance))
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
                yield asked(phrase, chance), bits

    def sample(self, number: int, seed: int) -> list[tuple[str, Bits]]:
        """The first `number` of `stream(seed)`."""
        return list(islice(self.stream(seed), number))

    def _mixed(self, each: Property | Fact, chance: random.Random) -> tuple[str, Bits]:
        kind = chance.random()
        if kind < 0.4:
            return _say(each, chance)
        if kind < 0.55:
            size = chance.choice((1, 1, 2, 2, 2, 3, 3, 4, 5, 7, 8, 9, 9))
            chosen = set(chance.sample(range(len(CLASSES)), size))
            bits = tuple(int(i in chosen) for i in range(len(CLASSES)))
            return self._named(bits, chance), bits
        if kind < 0.7:
            return self._combined(chance)
        phrase, bits = _say(each, chance, negated=0.0)
        if kind < 0.8 and not all(bits):
            return chance.choice(_EXCEPT + _EXCLUDE).format(phrase), _not(bits)
        return self._joined(phrase, bits, chance)

    def _joined(self, phrase: str, meant: Bits, chance: random.Random) -> tuple[str, Bits]:
        """A phrase joined with another one, or with the name of a class.

        Seldom the other one changes nothing: "animals with antlers, no dogs".
        """
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
            unchanged = forms is _WITHOUT and bits == meant and chance.random() < 0.3
            if any(bits) and (unchanged or bits not in (meant, other)):
                return chance.choice(forms).format(phrase, text), bits
        return phrase, meant

    def _combined(self, chance: random.Random) -> tuple[str, Bits]:
        """Names, and words for all animals or vehicles, listed, excepted, or listed with exceptions."""
        left, meant = self._terms(range(len(CLASSES)), chance.choice((1, 1, 2, 3)), chance)
        form = chance.random()
        if form < 0.3:
            return _listed_terms(left, chance), meant
        if form < 0.5:
            return _except(left, chance), _not(meant)
        # Of an animal or vehicle words may take something away; of names they would take back what was asked.
        inside = chance.random() < 0.5 and sum(meant) > 3
        chosen = [i for i, bit in enumerate(meant) if bit == inside]
        right, without = self._terms(chosen, chance.choice((1, 1, 2)), chance, kinds=0.15)
        bits = tuple(a & (1 - b) for a, b in zip(meant, without, strict=True))
        if not any(bits):
            return _listed_terms(left, chance), meant
        text = chance.choice(_WITHOUT)
        return text.format(_listed_terms(left, chance), _listed_terms(right, chance, text)), bits

    def _terms(
        self, classes: Sequence[int], number: int, chance: random.Random, kinds: float = 0.5
    ) -> tuple[list[Name], Bits]:
        """Names of some of `classes` that differ, with the chance `kinds` one of them for all of a kind."""
        names: list[Name] = []
        meant = {i: 0 for i in range(len(CLASSES))}
        whole, words = chance.choice(_KINDS)
        of_kind = [i for i, bit in enumerate(whole) if bit]
        if set(of_kind) <= set(classes) and chance.random() < kinds:
            names.append(chance.choice(words))
            meant |= dict.fromkeys(of_kind, 1)
            classes = [i for i in classes if not whole[i]]
            # "Vehicles" alone too, and of the other kind not all, so that something is left.
            number = max(0, min(number - 1 + int(chance.random() < 0.5), len(classes) - 1))
        for i in chance.sample(list(classes), min(number, len(classes))):
            names.append(chance.choice(self._names[i].names))
            meant[i] = 1
        chance.shuffle(names)
        return names, tuple(meant.values())

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
            names = listed([self._name(i, chance) for i in more or fewer], chance)
            return chance.choice(forms).format(_phrase(each, chance), names)
        return _phrase(chance.choice(exact), chance) if exact else None

    def _named(self, bits: Bits, chance: random.Random) -> str:
        """The classes by their names, or everything but the others."""
        chosen = [i for i, bit in enumerate(bits) if bit]
        others = [i for i, bit in enumerate(bits) if not bit]
        if others and (len(chosen) > _MOST_NAMED or (len(others) <= 3 and chance.random() < 0.5)):
            chance.shuffle(others)
            return _except([chance.choice(self._names[i].names) for i in others], chance)
        chance.shuffle(chosen)
        if chance.random() < 0.25:
            return listed([self._a(i, chance) for i in chosen], chance)
        return listed([self._name(i, chance) for i in chosen], chance)

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


def _not(bits: Bits) -> Bits:
    return tuple(1 - bit for bit in bits)


def _listed_terms(names: Sequence[Name], chance: random.Random, form: str = "") -> str:
    """Names in the plural or with articles, as one phrase for the end of `form`."""
    articles = chance.random() < 0.25 and not form.endswith(_ONLY_PLURAL)
    return listed([each.with_article() if articles else each.plural for each in names], chance)


def _except(names: Sequence[Name], chance: random.Random) -> str:
    """Everything but what the names mean."""
    if len(names) == 2 and chance.random() < 0.3:
        return chance.choice(_NEITHER).format(*(each.plural for each in names))
    form = _NON if len(names) == 1 and chance.random() < 0.1 else chance.choice(_EXCEPT + _EXCLUDE)
    return form.format(_listed_terms(names, chance, form))


def _say(each: Property | Fact, chance: random.Random, negated: float = 0.4) -> tuple[str, Bits]:
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


def listed(names: Sequence[str], chance: random.Random) -> str:
    """Names with commas and "or" or "and" between them."""
    if len(names) == 1:
        return names[0]
    word = chance.choice(("or", "or", "and", "and", "as well as"))
    comma = "," if len(names) > 2 and chance.random() < 0.5 else ""
    if chance.random() < 0.1:
        return ", ".join(names)
    return f"{', '.join(names[:-1])}{comma} {word} {names[-1]}"


def asked(phrase: str, chance: random.Random) -> str:
    """A request around a phrase, or the phrase alone."""
    request = "{}" if chance.random() < 0.4 else chance.choice(REQUESTS)
    if phrase.startswith(_WHOLE):
        request = "{}"
    elif re.match(r"an? ", phrase):
        request = chance.choice(_OF_ONE) if chance.random() < 0.3 else request.replace("all {}", "{}")
    elif re.match(_NO_ALL, phrase):
        request = request.replace("all {}", "{}")
    elif chance.random() < 0.1:
        request = chance.choice(_OF_MANY)
    text = request.format(phrase)
    form = chance.random()
    if form < 0.6:
        text = text[0].upper() + text[1:]
    if form < 0.15 and not text.endswith("?"):
        text += "."
    return text
