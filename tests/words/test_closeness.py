"""No property comes close to a published description, nor a test property to a training one; and the check
that says so finds rewordings."""

import pytest
from torch import Tensor

from rpg.text_encoder import TextEncoder
from rpg.words.closeness import (
    MOST_COSINE,
    MOST_SHARED_WORDS,
    content_words,
    cosines,
    shared_words,
    without_request,
)
from rpg.words.descriptions import DescriptionWriter, kinds_of_classes
from rpg.words.facts import as_properties, facts
from rpg.words.properties import OTHER_THINGS, Part, class_names, out_of_scope, properties, published

REWORDINGS = (
    "everything that is alive", "living beings", "organisms", "things that are alive", "living creatures",
    "road vehicles", "vehicles that drive on the road", "cars and other vehicles used on streets",
    "vehicles for the highway", "things that drive on roads", "flying things", "things able to fly",
    "everything that flies", "objects that are capable of flight", "things that fly through the air",
    "vehicles that travel over water", "watercraft", "means of transport on water", "transportation by sea",
    "water transport", "mammalian animals", "all the mammals", "animals that are mammals", "mammal species",
    "furry animals", "animals covered in fur", "animals that have fur", "creatures with furry coats",
    "animals with a coat of fur", "domestic pets", "pets that people keep at home", "common household pets",
    "animals often kept as pets", "pets", "animals with cold blood", "cold blooded creatures",
    "ectothermic animals", "animals that are cold-blooded", "things that transport cargo", "cargo carriers",
    "objects able to carry freight", "things that can carry goods", "things used for transport in business",
    "commercial transport", "commercial vehicles", "things companies use for transport",
    "animals that can swim", "natural swimmers", "swimming animals", "animals that swim by nature",
    "things that have wheels", "wheeled things", "things on wheels", "objects with wheels",
    "four-legged animals", "quadrupeds", "animals that have four legs", "creatures on four feet",
    "forest animals", "animals living in the woods", "creatures of the forest", "animals found in forests",
    "animals living close to water", "animals found near water", "waterside animals",
    "animals that live by the water", "artificial objects", "things made by humans", "human-made things",
    "manufactured objects", "objects made by man", "things that make sounds naturally",
    "naturally noisy things", "things that make natural noises", "tree climbers",
    "animals able to climb trees", "animals that climb up trees", "tree-climbing animals", "predators",
    "animals that prey on other animals", "hunting animals", "hunters among the animals",
    "man-made things that work on water", "artificial things that can float and move on water",
    "pets that can climb", "climbing pets", "pets able to climb",
)  # fmt: skip
"""Of the published descriptions, several of each, written to be caught."""


def phrases(part: Part) -> list[str]:
    """The phrases of a part's properties, and of the facts where it is learnt from."""
    table = [*properties(part), *(as_properties(facts()) if part is Part.training else [])]
    return [phrase for each in table for phrase in each.phrases]


def writer() -> DescriptionWriter:
    """Writes what is learnt from."""
    known = [*properties(Part.training), *kinds_of_classes(class_names())]
    return DescriptionWriter(class_names(), known, facts())


def close_words(texts: list[str]) -> list[tuple[str, str]]:
    """The texts that share too many words with a published description."""
    return [
        (text, description)
        for text in texts
        for description, _ in published()
        if shared_words(text, description) >= MOST_SHARED_WORDS
    ]


def test_requests_are_taken_off_and_stems_compared() -> None:
    assert without_request("Give me a model to select all living things") == "living things"
    assert without_request("find all sails.") == "sails"
    assert content_words("Select all things that can climb trees") == content_words("tree climbers")
    assert shared_words("Find animals with fur", "furs of creatures") == 1
    assert shared_words("Find animals with fur", "things with wings") == 0


def test_no_property_shares_its_words_with_a_published_description() -> None:
    for part in Part:
        assert not close_words(phrases(part))
    names = [name.plural for each in class_names() for name in (*each.names, *each.kinds)]
    assert not close_words(names)
    assert not close_words(list(out_of_scope(Part.training)[OTHER_THINGS]))


def test_no_written_description_shares_its_words_with_a_published_one() -> None:
    assert not close_words([text for text, _ in writer().sample(5000, 0)])


@pytest.fixture(scope="module")
def encoder(minilm: TextEncoder) -> TextEncoder:
    return minilm


def close_embeddings(texts: list[str], others: list[str], encoder: TextEncoder) -> Tensor:
    """For each text whether it is close to one of the others."""
    return (cosines(texts, others, encoder) > MOST_COSINE).any(1)


@pytest.mark.slow
def test_no_property_is_close_to_a_published_description(encoder: TextEncoder) -> None:
    descriptions = [description for description, _ in published()]
    for part in Part:
        texts = phrases(part)
        close = close_embeddings(texts, descriptions, encoder)
        assert not [text for text, is_close in zip(texts, close.tolist(), strict=True) if is_close]


@pytest.mark.slow
def test_properties_of_different_parts_are_not_close(encoder: TextEncoder) -> None:
    training = phrases(Part.training)
    others = phrases(Part.validation) + phrases(Part.test)
    assert not close_embeddings(others, training, encoder).any()
    assert not close_embeddings(phrases(Part.validation), phrases(Part.test), encoder).any()


@pytest.mark.slow
def test_the_check_finds_rewordings(encoder: TextEncoder) -> None:
    descriptions = [description for description, _ in published()]
    texts = list(REWORDINGS)
    by_words = {text for text, _ in close_words(texts)}
    by_embedding = close_embeddings(texts, descriptions, encoder).tolist()
    assert sum(by_embedding) / len(texts) > 0.7
    found = [text in by_words or close for text, close in zip(texts, by_embedding, strict=True)]
    # The others say the same in unlike words, which only a reader finds: organisms, predators, watercraft.
    assert sum(found) / len(texts) > 0.75
