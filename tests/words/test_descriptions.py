"""Written descriptions, read by a second implementation: what their words mean must be their bits."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpg.words.descriptions import REQUESTS, DescriptionWriter, kinds_of_classes
from rpg.words.facts import Fact, Form
from rpg.words.properties import CLASSES, Bits, ClassNames, Name, Part, Property, class_names, properties

# Names and phrases that no other word can be taken for: C3s is class 3, P0100000001 what holds for 1 and 9.
NAMES = [ClassNames((Name(f"C{i}", f"C{i}s"),), ()) for i in range(10)]
TABLE = [
    Property(bits, ("P" + "".join(map(str, bits)),))
    for bits in {tuple(random.Random(seed).choices((0, 1), k=10)) for seed in range(200)}
    if any(bits)
]
# Half of them are facts, which come up in the same ways.
FACTS = [Fact(each.bits, Form.are, each.phrases[0]) for each in TABLE[::2]]
WRITER = DescriptionWriter(NAMES, TABLE[1::2], FACTS)
ALL = frozenset(range(10))
TERM = r"(?:an? )?(?:C\ds?|P[01]{10})"
TERMS = rf"{TERM}(?:(?:, and |, or |, as well as |, | and | or | as well as ){TERM})*"


def term(text: str) -> frozenset[int]:
    """What a name, a phrase or a list of them means."""
    found: frozenset[int] = frozenset()
    for each in re.findall(r"C\d|P[01]{10}", text):
        found |= {int(each[1])} if each[0] == "C" else {i for i in ALL if each[i + 1] == "1"}
    return found


def meaning(text: str) -> frozenset[int]:
    """What a description means, by the rules of English as far as they are needed here."""
    first = re.search(
        r"neither|either|everything|anything|all (but|classes)|things|\bnot?\b|(an? )?\b[CP]\d", text, re.I
    )
    assert first is not None, text
    text = re.sub(r"( from the rest)?[.?]?$", "", text[first.start() :])
    if match := re.fullmatch(rf"(?:things that are )?neither ({TERMS}) nor ({TERMS})", text, re.I):
        return ALL - term(match[1]) - term(match[2])
    if match := re.fullmatch(rf"no ({TERMS}) and no ({TERMS})", text, re.I):
        return ALL - term(match[1]) - term(match[2])
    if match := re.fullmatch(rf"things that are both ({TERM}) and ({TERM})", text, re.I):
        return term(match[1]) & term(match[2])
    for joint in ("that are also", "which are", "that are"):
        if match := re.fullmatch(rf"({TERM}) {joint} ({TERM})(?P<end> at the same time| too)?", text):
            assert joint == "that are also" or match["end"], f"{text}: is either 'too' or a mistake"
            return term(match[1]) & term(match[2])
    without = r"except|but not|that are not|, without|other than|, but no|apart from"
    if match := re.fullmatch(rf"({TERM}) ?(?:{without}) ({TERMS})", text):
        return term(match[1]) - term(match[2])
    all_but = r"(?:everything|anything|all|all classes|things) "
    all_but += r"(?:but|except|other than|that is not|that are not|apart from)"
    if match := re.fullmatch(rf"(?:{all_but}|not|no) ({TERMS})", text, re.I):
        return ALL - term(match[1])
    if match := re.fullmatch(
        rf"(?:either )?({TERMS})(?: plus |, and also | or | and )?({TERMS})?", text, re.I
    ):
        return term(text)
    raise AssertionError(f"not understood: {text}")


def members(bits: Bits) -> frozenset[int]:
    return frozenset(i for i, bit in enumerate(bits) if bit)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**40))
def test_descriptions_of_a_stream_mean_their_bits(seed: int) -> None:
    for text, bits in WRITER.sample(20, seed):
        assert meaning(text) == members(bits), text


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 1022), st.integers(0, 2**40))
def test_descriptions_of_a_task_mean_its_classes(task: int, seed: int) -> None:
    bits = tuple(int(bit) for bit in f"{task:010b}")
    texts = WRITER.of_task(bits, 8, seed)
    assert len(texts) == len(set(texts)) == 8
    for text in texts:
        assert meaning(text) == members(bits), text


def test_equal_seeds_write_the_same_and_others_do_not() -> None:
    writer = DescriptionWriter(class_names(), properties(Part.training))
    assert writer.sample(300, 7) == writer.sample(300, 7)
    assert writer.sample(300, 7) != writer.sample(300, 8)
    bits = (1, 0, 1, 0, 0, 0, 0, 0, 0, 0)
    assert writer.of_task(bits, 30, 1) == writer.of_task(bits, 30, 1) != writer.of_task(bits, 30, 2)


def test_every_property_and_every_request_is_used() -> None:
    table = properties(Part.training)
    writer = DescriptionWriter(class_names(), table)
    texts = [text.lower() for text, _ in writer.sample(12 * len(table), 0)]
    # Words at a phrase's beginning may be replaced, those at its end are kept.
    unused = [
        each
        for each in table
        if not any(phrase.lower()[-8:] in text for phrase in each.phrases for text in texts)
    ]
    assert not unused
    starts = {request.partition("{}")[0].strip().lower().removesuffix(" all") for request in REQUESTS}
    assert not [start for start in starts if not any(text.startswith(start) for text in texts)]


def test_descriptions_of_a_task_say_properties_as_well_as_names() -> None:
    writer = DescriptionWriter(class_names(), properties(Part.training))
    bits = (1, 0, 1, 0, 0, 0, 0, 0, 0, 0)
    texts = " ".join(writer.of_task(bits, 40, 0))
    assert "wing" in texts and ("plane" in texts or "aircraft" in texts)


def test_kinds_of_classes_are_properties_of_their_class() -> None:
    kinds = kinds_of_classes(class_names())
    found = {phrase: each.bits for each in kinds for phrase in each.phrases}
    assert members(found["ponies"]) == {CLASSES.index("horse")}
    assert members(found["an airliner"]) == {CLASSES.index("airplane")}


@pytest.mark.parametrize("number", [0, 1, 50])
def test_the_number_of_descriptions_is_kept(number: int) -> None:
    assert len(WRITER.of_task((0, 1, 0, 0, 0, 0, 0, 0, 0, 1), number, 0)) == number
    assert len(WRITER.sample(number, 0)) == number
