"""What a service tells of jobs, models and generators. Keys that a newer service adds are passed over."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from rpg.errors import RPGError

_ENDS = ("succeeded", "failed", "cancelled")


class _View:
    @classmethod
    def from_json(cls, value: Any) -> Self:
        """The view of parsed JSON.

        Raises:
            RPGError: if it lacks something.
        """
        fields = {each.name for each in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if not isinstance(value, Mapping) or (missing := fields - value.keys()):
            lacking = (
                "is no object" if not isinstance(value, Mapping) else f"lacks {', '.join(sorted(missing))}"
            )
            raise RPGError(f"the answer {lacking}: expected that of RPG's service")
        return cls(**{name: value[name] for name in fields})


@dataclass(frozen=True)
class Job(_View):
    """A job and how far it is. Times are seconds since the epoch."""

    id: str
    owner: str
    generator: str
    digest: str | None
    """Of the generator, once it is known."""
    state: str
    """queued, running, succeeded, failed or cancelled."""
    error: str | None
    """Why it failed, or what it waits for."""
    priority: int
    seed: int
    sampling: Mapping[str, Any]
    """Solver, steps, eta, guidance, temperature, clip, token_batch, precision."""
    dtype: str | None
    """Of the networks' floating-point tensors; None: the collection's own."""
    evaluate: bool
    accuracy: float | None
    """Mean of the finished models', where it is measured."""
    models: int
    """Models asked for; model i is for condition or description i // number."""
    number: int
    finished: int
    """Models that can be downloaded."""
    bytes: int
    """Of all finished models."""
    created: float
    started: float | None
    ended: float | None
    models_per_second: float | None
    seconds_left: float | None
    version: int
    """Another one whenever something has changed."""

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will be made."""
        return self.state in _ENDS


@dataclass(frozen=True)
class JobPage(_View):
    """A page of jobs, newest first; `next` goes into `after` for the following page, None at the end."""

    jobs: list[Job]
    next: str | None

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """See `Job.from_json`."""
        page = super().from_json(value)
        return dataclasses.replace(page, jobs=[Job.from_json(each) for each in page.jobs])


@dataclass(frozen=True)
class ModelFile(_View):
    """A finished model: its index in the job, the SHA-256 and the size of its file, what it is worth."""

    index: int
    sha256: str
    bytes: int
    accuracy: float | None = None
    """Share of right answers on test images, where the job asked for evaluation."""
    similarity: float | None = None
    """Largest overlap of its wrong answers with those of a training network of its condition."""
    description: str | None = None
    """That it was asked for by, if it was."""


@dataclass(frozen=True)
class ModelPage(_View):
    """A page of a job's finished models by index; `next` goes into `start` for the following page."""

    models: list[ModelFile]
    next: int | None

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """See `Job.from_json`."""
        page = super().from_json(value)
        return dataclasses.replace(page, models=[ModelFile.from_json(each) for each in page.models])


@dataclass(frozen=True)
class GeneratorInfo(_View):
    """A generator that is served. What is None is not known until its first replica has started."""

    name: str
    ready: bool
    condition: str
    """vector, permutation or none."""
    condition_size: int
    descriptions: bool
    """Whether jobs may give descriptions in place of conditions."""
    evaluates: bool
    """Whether jobs may ask for evaluation."""
    sampling: Mapping[str, Any]
    """Its own defaults."""
    digest: str | None
    device: str | None
    tokens: int | None
    """Tokens of a network."""
    token_size: int | None
    parameters: int | None
    """Of the generator itself."""
    model_bytes: int | None
    """Of one network's file, without provenance."""
    models_per_second: float | None
    """Measured while jobs ran."""
