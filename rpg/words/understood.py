"""What was understood of a description: the interface of every way from words to classes."""

from dataclasses import dataclass
from typing import Protocol

from rpg.words.properties import CLASSES, Bits


@dataclass(frozen=True)
class Understood:
    """Which classes a description means, and how sure that is.

    Attributes:
        probabilities: for each of `CLASSES`, the probability that it is meant.
        sureness: the share of the ten answers that is expected to be right, 0.5 (a guess) to 1. It counts as
            a guess what is not about the classes at all.
        is_sure: whether sureness reached the bound below which the description should not be acted on.
    """

    probabilities: tuple[float, ...]
    sureness: float
    is_sure: bool

    @property
    def bits(self) -> Bits:
        """The condition: 1 for each class that is more likely meant than not."""
        return tuple(int(probability > 0.5) for probability in self.probabilities)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that are more likely meant than not."""
        return tuple(name for name, bit in zip(CLASSES, self.bits, strict=True) if bit)


class Understanding(Protocol):
    """A way from words to classes."""

    def understand(self, description: str) -> Understood:
        """Which classes a description means.

        Raises:
            RPGError: if the description is empty, too long or not text.
        """
