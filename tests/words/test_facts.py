"""Facts: what they say in many words means the classes that a second reader of the words finds."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rpg.words.facts import Fact, Form, as_properties, facts
from rpg.words.properties import CLASSES, Bits, Part, bits_of, properties

ANIMALS = {"bird", "cat", "deer", "dog", "frog", "horse"}
WINGS = bits_of("airplane bird")
FACTS = [
    Fact(WINGS, Form.have, "wings"),
    Fact(bits_of("cat"), Form.have, "a rough tongue"),
    Fact(bits_of("dog"), Form.do, "bark"),
    Fact(bits_of("airplane bird"), Form.do, "can glide"),
    Fact(bits_of("horse"), Form.do, "are ridden"),
    Fact(bits_of("airplane automobile ship truck"), Form.do, "never sleep"),
    Fact(bits_of("deer horse"), Form.are, "hoofed beasts"),
]


def members(bits: Bits) -> set[str]:
    return {name for name, bit in zip(CLASSES, bits, strict=True) if bit}


def meaning(text: str, fact: Fact) -> set[str]:
    """What a phrase means, by its first word and by whether it is negative where the fact is not."""
    if (
        re.search(r"\b(animal|animals|creature|creatures|beasts|critters|beings)\b", text)
        and fact.form is not Form.are
    ):
        heads = ANIMALS
    elif re.search(r"\b(vehicles?|machines?|means of transport)\b", text):
        heads = set(CLASSES) - ANIMALS
    else:
        heads = set(CLASSES)
    plain = text.replace("never sleep", "")
    negative = re.search(r"\b(without|no|lack|not|cannot|never)\b|n't\b", plain)
    return heads - members(fact.bits) if negative else heads & members(fact.bits)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FACTS), st.integers(0, 2**40), st.floats(0, 1))
def test_what_is_said_of_a_fact_means_its_bits(fact: Fact, seed: int, negated: float) -> None:
    text, bits = fact.said(random.Random(seed), negated)
    assert any(bits)
    assert members(bits) == meaning(text, fact), text


def test_a_fact_is_said_in_many_ways_and_negated() -> None:
    chance = random.Random(0)
    said = {FACTS[0].said(chance, 0.5) for _ in range(500)}
    assert {
        ("things with wings", WINGS),
        ("vehicles without wings", bits_of("automobile ship truck")),
    } <= said
    assert {("animals that have wings", bits_of("bird")), ("wings", WINGS)} <= said
    assert all(text.count("wings") == 1 for text, _ in said)
    barks = {FACTS[2].said(chance, 0.5)[0] for _ in range(500)}
    assert {"animals that bark", "creatures that do not bark", "things which never bark"} <= barks
    assert not [text for text in barks if text.startswith("vehicles that bark")]


def test_the_plainest_phrases_mean_exactly_the_classes() -> None:
    by_text = {fact.text: fact.property() for fact in FACTS}
    assert by_text["wings"].phrases == ("things with wings",)
    assert by_text["bark"].phrases == ("things that bark", "animals that bark")
    assert by_text["never sleep"].phrases == ("things that never sleep", "vehicles that never sleep")
    assert by_text["hoofed beasts"].phrases == ("hoofed beasts",)


def test_the_table_has_many_facts_of_every_class_and_form() -> None:
    table = facts()
    assert len(table) > 4000
    assert all(any(each.bits) for each in table)
    assert min(Counter(each.form for each in table).values()) > 500
    for i in range(len(CLASSES)):
        assert 500 < sum(each.bits[i] for each in table) < len(table) - 500
    assert len({each.bits for each in table}) > 90


def test_no_phrase_means_two_things() -> None:
    meanings: dict[str, set[Bits]] = {}
    for each in [*as_properties(facts()), *(each for part in Part for each in properties(part))]:
        for phrase in each.phrases:
            meanings.setdefault(phrase.lower(), set()).add(each.bits)
    assert not [phrase for phrase, bits in meanings.items() if len(bits) > 1]


@pytest.mark.parametrize("form", list(Form))
def test_facts_have_no_words_of_their_own_before_them(form: Form) -> None:
    first = {Form.have: "with |that |things ", Form.do: "that |with |things ", Form.are: "that |with "}[form]
    assert not [each.text for each in facts() if each.form is form and re.match(first, each.text)]
