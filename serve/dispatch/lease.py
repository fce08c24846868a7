"""What passes between the dispatcher and a generator's replicas."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from rpg.words.understood import Understood
from serve.dispatch.records import Made


@dataclass(frozen=True)
class Lease:
    """Models of one job that a replica is asked to make; it reads the job's manifest from storage."""

    job: str
    priority: int
    digest: str
    """Of the generator that they must be made with."""
    models: tuple[int, ...]


@dataclass(frozen=True)
class GeneratorReport:
    """What a replica tells of the generator that it has loaded."""

    digest: str
    device: str
    tokens: int
    """Of one network."""
    token_size: int
    parameters: int
    """Of the generator."""
    model_bytes: int
    """Of one network's file, without provenance."""
    card: str
    tensors: list[tuple[str, tuple[int, ...], str]]
    """Name, shape and dtype of each tensor of a network."""
    centre: list[tuple[str, list[float]]]
    """Of each generated tensor, values of the mean training checkpoint (`centre_preview`)."""
    classes: list[str] | None = None
    """What the condition's values stand for, where a words model understands descriptions."""


@dataclass(frozen=True)
class Embedded:
    """Embeddings of descriptions, in their order, and the digest of the text encoder that made them."""

    encoder: str
    conditions: list[list[float]]
    understood: list[Understood] | None = None
    """What a words model made the conditions of."""


class Replicas(Protocol):
    """All replicas of one generator together: each call goes to one of them."""

    def make(self, lease: Lease) -> AsyncIterator[list[Made] | str]:
        """Yield finished models as they are there; a text says why the job cannot be made, and is the end.

        Closing the iterator stops the work within a denoising batch. Any exception means that the replica is
        lost: what has not been yielded may be asked for again.
        """
        ...

    async def embed(self, descriptions: list[str]) -> Embedded | str:
        """Wait for a replica, and have it embed descriptions; a text says why it cannot."""
        ...

    async def understand(self, description: str) -> Understood | str:
        """Wait for a replica, and have it understand a description; a text says why it cannot."""
        ...

    async def describe(self) -> GeneratorReport:
        """Wait for a replica, and ask it what it has loaded."""
        ...
