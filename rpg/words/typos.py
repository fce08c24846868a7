"""Slips of the keyboard, so that what is learnt holds for descriptions that are typed in a hurry."""

import random
import re

_LONG_WORDS = re.compile(r"\b[A-Za-z]{5,}\b")
"""In shorter words, such as "not", one letter may change what is meant."""


def mistyped(text: str, chance: random.Random) -> str:
    """The text with one slip behind the first letter of one word of five letters or more, if it has any.

    Two neighbours that differ are swapped, or a letter is doubled or left out.
    """
    words = list(_LONG_WORDS.finditer(text))
    if not words:
        return text
    word = chance.choice(words)
    i = chance.randrange(word.start() + 1, word.end())
    slip = chance.random()
    if slip < 0.5 and i + 1 < word.end() and text[i] != text[i + 1]:
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]
    return text[:i] + text[i] * 2 * (slip < 0.75) + text[i + 1 :]
