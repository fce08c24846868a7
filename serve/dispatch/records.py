"""What is known of a job: the manifest, which never changes, and the state, which does."""

import dataclasses
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from rpg.config import SamplingConfig, Solver, TokenDtype
from rpg.errors import RPGError
from rpg.sampling.job import GenerationJob


class State(StrEnum):
    """Where a job is. The last three are ends."""

    queued = "queued"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def is_end(self) -> bool:
        """Whether nothing more will be made."""
        return self in (State.succeeded, State.failed, State.cancelled)


class Made(NamedTuple):
    """A finished model: its index in the job, its file's hexadecimal SHA-256 and size, what it is worth.

    The last two are `rpg.evaluation.judge.Judgement`'s, where the job asked for evaluation.
    """

    model: int
    sha256: str
    bytes: int
    accuracy: float | None = None
    similarity: float | None = None


@dataclass(frozen=True)
class Manifest:
    """What was asked for, by whom and when (seconds since the epoch)."""

    id: str
    owner: str
    generator: str
    priority: int
    created: float
    job: GenerationJob
    evaluate: bool = False
    idempotency_key: str | None = None
    request_sha256: str = ""
    """Of the request's body: one key must not stand for two requests."""
    descriptions: list[str] | None = None
    """What the job's conditions are embeddings of, if it was asked for so."""
    encoder: str | None = None
    """Digest of the text encoder that made them."""

    def description_of(self, index: int) -> str | None:
        """The description that model `index` is asked for by."""
        return None if self.descriptions is None else self.descriptions[index // self.job.number]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "Manifest":
        """The manifest of parsed JSON.

        Raises:
            RPGError: saying what is wrong with it.
        """
        try:
            given = dict(value)
            job = dict(given["job"])
            sampling = dict(job["sampling"])
            job["sampling"] = SamplingConfig(**{**sampling, "solver": Solver(sampling["solver"])})
            if job.get("dtype") is not None:
                job["dtype"] = TokenDtype(job["dtype"])
            given["job"] = GenerationJob(**job)
            manifest = cls(**given)
            _check_types(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RPGError(f"not a job's manifest: {error!r}") from error
        return manifest


@dataclass
class Progress:
    """How far a job is. `digest` is that of the generator that its models are made with, once known."""

    state: State = State.queued
    digest: str | None = None
    error: str | None = None
    started: float | None = None
    ended: float | None = None
    made: dict[int, Made] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        rest = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "made"}
        return {**rest, "made": [list(made) for made in self.made.values()]}

    @classmethod
    def from_json(cls, value: Any, models: int) -> "Progress":
        """The progress of parsed JSON, of a job of so many models.

        Raises:
            RPGError: saying what is wrong with it.
        """
        try:
            given = dict(value)
            made = [
                Made(int(i), str(sha256), int(size), *(None if x is None else float(x) for x in worth))
                for i, sha256, size, *worth in given.pop("made")
            ]
            if not all(0 <= each.model < models for each in made):
                raise ValueError("a model's index is out of range")
            given["state"] = State(given["state"])
            return cls(**given, made={each.model: each for each in made})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RPGError(f"not a job's state: {error!r}") from error


def _check_types(manifest: Manifest) -> None:
    texts = (manifest.id, manifest.owner, manifest.generator, manifest.request_sha256)
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("expected text")
    job = manifest.job
    numbers = (manifest.priority, job.number, job.seed)
    if not all(isinstance(number, int) for number in numbers) or not math.isfinite(manifest.created):
        raise TypeError("expected whole numbers")
    described = manifest.descriptions
    if described is not None:
        if not all(isinstance(text, str) for text in [*described, manifest.encoder]):
            raise TypeError("expected text")
        if len(described) != len(job.conditions or []):
            raise ValueError("expected a condition for each description")
    for condition in job.conditions or []:
        if not all(math.isfinite(value) for value in condition):
            raise ValueError("a condition is not finite")
