"""Which descriptions a network is made for."""

import pytest

from rpg.errors import RPGError
from rpg.words.understood import Understood

FLY = tuple(0.9 if i in (0, 2) else 0.1 for i in range(10))


def test_a_sure_description_gives_its_bits() -> None:
    understood = Understood(FLY, 0.9, True)
    assert understood.condition("things that fly") == [1.0, 0.0, 1.0] + [0.0] * 7
    assert understood.classes == ("airplane", "bird")


@pytest.mark.parametrize(
    ("understood", "words"),
    [
        (Understood(FLY, 0.6, False), r"not sure what is meant; perhaps airplane, bird \(sureness 0\.60\)"),
        (Understood((0.1,) * 10, 0.5, False), "perhaps none of the classes"),
        (Understood((0.1,) * 10, 0.9, True), r"means none of the 10 classes \(sureness 0\.90\)"),
        (Understood((0.9,) * 10, 0.9, True), "means all of the 10 classes"),
    ],
)
def test_others_are_refused_in_one_line(understood: Understood, words: str) -> None:
    with pytest.raises(RPGError, match=words) as refusal:
        understood.condition("very\nlong " * 200)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 200
