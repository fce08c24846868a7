"""What was understood of a description: the interface of every way from words to classes."""

from dataclasses import dataclass
from typing import Protocol

from rpg.errors import RPGError
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
        """For each class 1 if it is more likely meant than not, else 0."""
        return tuple(int(probability > 0.5) for probability in self.probabilities)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes that are more likely meant than not."""
        return tuple(name for name, bit in zip(CLASSES, self.bits, strict=True) if bit)

    def summary(self) -> str:
        """Which classes are meant, how likely each is, and the sureness, in one line."""
        likely = ", ".join(
            f"{name} ({probability:.2f})"
            for name, probability in zip(CLASSES, self.probabilities, strict=True)
            if probability > 0.5
        )
        return f"{likely or 'none of the classes'}; sureness {self.sureness:.2f}"

    def condition(self, description: str) -> list[float]:
        """The bits as the condition of a network that is worth making.

        Args:
            description: what was understood so; named in errors.

        Raises:
            RPGError: if it is not sure, or the network would give every image the same answer.
        """
        said = f"description {description if len(description) <= 40 else description[:40] + '…'!r}"
        sureness = f"sureness {self.sureness:.2f}"
        if not self.is_sure:
            guess = ", ".join(self.classes) or "none of the classes"
            raise RPGError(f"{said}: not sure what is meant; perhaps {guess} ({sureness})")
        if len(self.classes) in (0, len(CLASSES)):
            meant = "all" if self.classes else "none"
            raise RPGError(
                f"{said}: means {meant} of the {len(CLASSES)} classes ({sureness}); "
                "expected some that a network can tell from the others"
            )
        return [float(bit) for bit in self.bits]


class Understanding(Protocol):
    """A way from words to classes."""

    def understand(self, description: str) -> Understood:
        """Which classes a description means.

        Raises:
            RPGError: if the description is empty, too long or not text.
        """
