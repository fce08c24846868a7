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
KINDS = {"animal": {2, 3, 4, 5, 6, 7}, "creature": {2, 3, 4, 5, 6, 7}}
KINDS |= {"vehicle": {0, 1, 8, 9}, "machine": {0, 1, 8, 9}}
WORD = rf"C\ds?|P[01]{{10}}|(?:{'|'.join(KINDS)})s?"
TERM = rf"(?:an? )?(?:{WORD})"
TERMS = rf"{TERM}(?:(?:, and |, or |, as well as |, | and | or | as well as ){TERM})*"
ENDS = (
    " (?:from|apart from|vs.|against) the rest| (?:vs|versus) everything else| versus all others|,? please"
    "| only| or not| in my picture| in this photo| in the image| in it| here"
)
ALL_BUT = """everything (?:but|except for|except|that is not|apart from|excluding|minus|without|leaving out)
anything (?:but|other than|that isn't|that is not|which isn't)
all (?:but|except|classes except|without any)
things (?:that are not|that aren't|other than)
whatever is not|pictures without any|the opposite of|no|not
exclude all|exclude|excluding|leave out|ignore|filter out|remove|don't show|do not select|without
i don't want|i do not want any""".replace("\n", "|")
MINUS = """except for|except|but not|but no|and no|not|no|that are not|that aren't|which aren't
without any|without|other than|apart from|minus|excluding|leaving out""".replace("\n", "|")


def term(text: str) -> frozenset[int]:
    """What a name, a phrase or a list of them means."""
    found: frozenset[int] = frozenset()
    for each in re.findall(WORD, text, re.I):
        if each[0] in "Cc" and each[1].isdigit():
            found |= {int(each[1])}
        elif each[0] in "Pp":
            found |= {i for i in ALL if each[i + 1] == "1"}
        else:
            found |= KINDS[each.lower().removesuffix("s")]
    return found


def meaning(text: str) -> frozenset[int]:
    """What a description means, by the rules of English as far as they are needed here."""
    text = re.sub(rf"({ENDS})?[.?]?$", "", text)
    first = re.search(
        rf"\b(neither|either|things that are (both|neither)|({ALL_BUT}|{TERM})\b|non-)", text, re.I
    )
    assert first is not None, text
    text = text[first.start() :]
    if match := re.fullmatch(rf"(?:things that are )?neither ({TERMS}) nor ({TERMS})", text, re.I):
        return ALL - term(match[1]) - term(match[2])
    if match := re.fullmatch(rf"no ({TERMS}) and no ({TERMS})", text, re.I):
        return ALL - term(match[1]) - term(match[2])
    if match := re.fullmatch(rf"things that are both ({TERM}) and ({TERM})", text, re.I):
        return term(match[1]) & term(match[2])
    for joint in ("that are also", "which are", "that are"):
        if match := re.fullmatch(rf"({TERM}) {joint} ({TERM})(?P<end> at the same time| too)?", text, re.I):
            assert joint == "that are also" or match["end"], f"{text}: is either 'too' or a mistake"
            return term(match[1]) & term(match[2])
    if match := re.fullmatch(rf"(?:(?:{ALL_BUT}) |non-)({TERMS})", text, re.I):
        return ALL - term(match[1])
    if match := re.fullmatch(rf"({TERMS}),? (?:{MINUS}) ({TERMS})", text, re.I):
        return term(match[1]) - term(match[2])
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


@pytest.mark.parametrize(
    "form",
    [
        "vs everything else$", "or not\\?$", "^is there an? ", "^are there ", "^exclude ", "^I don't want ",
        "the opposite of", "non-", "that isn't", "aren't", " minus ", "excluding", "leaving out",
        "without any", "other than", "apart from", r"C\ds (and|or) C\ds,? (but )?no[t]? C\ds",
        r"^(vehicles|animals)(,| and) C\ds", r"^C\ds( or|,) (vehicles|animals)",
        "(vehicles|animals),? (but no|except|minus) C",
        "(not|but|except|than) (vehicles|animals|a vehicle|an animal)$",
    ],
)  # fmt: skip
def test_what_people_ask_in_is_written(form: str) -> None:
    found = [text for text, _ in WRITER.sample(20_000, 0) if re.search(form, text, re.I)]
    assert len(set(found)) > 5, found


def test_exclusions_that_change_nothing_are_written() -> None:
    lists = [
        re.fullmatch(rf"({TERMS}),? (?:{MINUS}) ({TERMS})", text) for text, _ in WRITER.sample(20_000, 0)
    ]
    unchanged = [not term(each[1]) & term(each[2]) for each in lists if each]
    assert 0.2 < sum(unchanged) / len(unchanged) < 0.8


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
