"""How close two descriptions are: by the words that they share, and by their embeddings."""

import re
from collections.abc import Sequence

from torch import Tensor

from rpg.text_encoder import TextEncoder
from rpg.words.embedding import embeddings

MOST_SHARED_WORDS = 0.5
"""Descriptions that share at least this part of their content words are close."""
MOST_COSINE = 0.75
"""Descriptions of a larger cosine similarity are close. Of 87 rewordings of the published descriptions, 75 %
are above it; unlike properties are seldom (`tests/words/test_closeness.py`)."""

_REQUESTS = re.compile(
    r"^(give me (a|the) \w+ (to \w+( all)?|for|that finds)|"
    r"(please )?(find|select|classify|identify|show me)( all)?) ",
    re.IGNORECASE,
)
_WORDS_OF_ANY = """
    a an the all any every of in on at to that which who are is be can have has with for and or both not no do
    does from by it its their them as find select identify classify give me model thing things animal animals
    creature creatures object objects vehicle vehicles beast beasts anything everything something kind kinds
    commonly found used live lives operate travel method methods
"""
"""Words that descriptions of any content have."""
_ENDINGS = ("ing", "ers", "er", "ed", "s")


def without_request(description: str) -> str:
    """A description without what asks for it, such as "Find all"."""
    return _REQUESTS.sub("", description).rstrip(".?!")


def content_words(description: str) -> frozenset[str]:
    """Stems of the words that are not in descriptions of any kind."""
    words = re.findall(r"[a-z]+", without_request(description).lower())
    return frozenset(_stem(word) for word in words if word not in _WORDS_OF_ANY.split())


def shared_words(first: str, second: str) -> float:
    """Content words of both descriptions over those of either, 0 to 1."""
    a, b = content_words(first), content_words(second)
    return len(a & b) / max(1, len(a | b))


def cosines(first: Sequence[str], second: Sequence[str], encoder: TextEncoder) -> Tensor:
    """Cosine similarities [first, second] of the embeddings, without requests."""
    one, other = (embeddings(encoder, [without_request(text) for text in texts]) for texts in (first, second))
    return one @ other.T


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word.removesuffix(ending)
    return word
