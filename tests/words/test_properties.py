"""The hand-written tables: what they hold, and that their parts say different things."""

from collections import Counter
from itertools import combinations

import pytest

from rpg.errors import RPGError
from rpg.tasks.class_subsets import CLASSES as NUMBER_OF_CLASSES
from rpg.words.properties import (
    CLASSES,
    Part,
    bits_of,
    class_names,
    out_of_scope,
    properties,
    published,
)


@pytest.mark.parametrize(("part", "least"), [(Part.training, 200), (Part.validation, 60), (Part.test, 60)])
def test_each_part_has_many_properties_of_several_phrases(part: Part, least: int) -> None:
    table = properties(part)
    assert len(table) >= least
    assert sum(len(each.phrases) > 1 for each in table) > len(table) / 2
    assert all(len(each.bits) == NUMBER_OF_CLASSES == len(CLASSES) for each in table)
    assert all(any(each.bits) for each in table), "a network answers yes to something"
    assert len({each.bits for each in table}) >= 25
    for i in range(len(CLASSES)):
        assert 5 < sum(each.bits[i] for each in table) < len(table) - 5


def test_no_phrase_stands_twice_in_the_tables() -> None:
    phrases = [phrase.lower() for part in Part for each in properties(part) for phrase in each.phrases]
    assert not [phrase for phrase, times in Counter(phrases).items() if times > 1]


def test_no_other_text_stands_twice_and_every_part_has_all_kinds() -> None:
    texts = [text for part in Part for kind in out_of_scope(part).values() for text in kind]
    assert len(set(texts)) == len(texts)
    assert len({frozenset(out_of_scope(part)) for part in Part}) == 1
    assert {len(out_of_scope(Part.test)["languages"]) >= 10, len(out_of_scope(Part.test)["nonsense"]) >= 10}


def test_names_of_one_class_are_not_names_of_another() -> None:
    names = [
        {name.singular for name in (*each.names, *each.kinds)} | {name.plural for name in each.names}
        for each in class_names()
    ]
    for first, second in combinations(names, 2):
        assert not first & second
    for each, name in zip(class_names(), CLASSES, strict=True):
        assert each.names[0].singular == name


def test_bits_follow_the_order_of_the_classes() -> None:
    assert bits_of("truck airplane") == (1, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    assert bits_of("all") == (1,) * 10
    with pytest.raises(RPGError, match="'lorry'"):
        bits_of("truck lorry")


def test_the_published_descriptions_are_all_there() -> None:
    assert len(published()) == 21
    # The counts of the published card's table: bits that are set, and the share of bits that are not.
    assert sum(sum(bits) for _, bits in published()) == 65
    assert dict(published())["Find all things with wheels"] == bits_of("airplane automobile truck")
