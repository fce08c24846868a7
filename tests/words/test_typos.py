"""Slips of the keyboard: one in a long word, and nothing else changes."""

import random

from hypothesis import given
from hypothesis import strategies as st

from rpg.words.typos import mistyped


def slips(word: str) -> set[str]:
    """All that a word can become, written out."""
    swapped = {word[:i] + word[i : i + 2][::-1] + word[i + 2 :] for i in range(1, len(word) - 1)}
    doubled = {word[: i + 1] + word[i:] for i in range(1, len(word))}
    missing = {word[:i] + word[i + 1 :] for i in range(1, len(word))}
    return (swapped - {word}) | doubled | missing


@given(st.text("ab cd'-", max_size=30), st.integers(0, 2**40))
def test_one_long_word_slips_and_the_rest_is_kept(text: str, seed: int) -> None:
    found = mistyped(text, random.Random(seed))
    parts = "".join(each if each in "abcd" else f" {each} " for each in text).split(" ")
    long = [i for i, part in enumerate(parts) if len(part) >= 5]
    allowed = {
        "".join([*parts[:i], slip, *parts[i + 1 :]]).replace("  ", " ")
        for i in long
        for slip in slips(parts[i])
    }
    assert found.replace("  ", " ").replace(" ", "") in {each.replace(" ", "") for each in allowed or {text}}


def test_every_slip_comes_up_and_short_words_never_change() -> None:
    found = {mistyped("no birds or cats", random.Random(seed)) for seed in range(500)}
    assert found == {f"no {slip} or cats" for slip in slips("birds")}
    assert mistyped("a cat or no dog", random.Random(0)) == "a cat or no dog"
