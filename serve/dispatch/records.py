"""What is known of a job: the manifest, which never changes, and the progress, which does. Both are files.

Pydantic reads the files by the types of the fields, as it does with requests.
"""

import json
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, TypeVar

from annotated_types import Ge, Interval
from pydantic import (
    GetCoreSchemaHandler,
    GetPydanticSchema,
    StringConstraints,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import CoreSchema, core_schema

from rpg.client.schema import JobState, Priority, Sha256, Size
from rpg.config import Finite
from rpg.errors import RPGError
from rpg.sampling.job import GenerationJob
from rpg.sampling.pack import PACK_PATTERN
from rpg.words.properties import CLASSES
from rpg.words.understood import Understood

T = TypeVar("T")


Time = Annotated[Finite, Interval(ge=0, le=2**40)]
"""Seconds since the epoch, within what a tar file can say."""


PackName = Annotated[str, StringConstraints(pattern=f"^{PACK_PATTERN}$")]


class Made(NamedTuple):
    """A finished model: its index in the job, its file's hexadecimal SHA-256 and size, what it is worth.

    The others are there where the job asked for evaluation (`rpg.evaluation.single_network.Judgement`).
    """

    model: Annotated[int, Ge(0)]
    sha256: Sha256
    bytes: Size
    accuracy: Finite | None = None
    similarity: Finite | None = None
    metrics: dict[str, Finite] | None = None
    failure: str | None = None
    """Why the model could not be measured."""
    pack: PackName | None = None
    """The file that it lies in with others; None: it has its own."""
    offset: Size = 0
    """Where in the pack it begins."""

    def is_file(self, found: "Made") -> bool:
        """Whether it is the model of a file with this size and digest."""
        return (self.sha256, self.bytes) == (found.sha256, found.bytes)


@dataclass(frozen=True)
class JobManifest:
    """What was asked for, by whom and when (seconds since the epoch): the file `job.json`.

    Raises:
        ValueError: if there are descriptions, and they and the conditions are not as many, or nothing says
            which text encoder read them.
    """

    id: str
    owner: str
    generator: str
    priority: Priority
    created: Time
    job: GenerationJob
    evaluate: bool = False
    pack: bool = False
    """Whether small models are stored many in a file."""
    idempotency_key: str | None = None
    request_sha256: str = ""
    """SHA-256 of the request's body, since one key must not stand for two requests."""
    descriptions: list[str] | None = None
    """What the job's conditions are embeddings of, if it was asked for so."""
    encoder: str | None = None
    """Digest of the text encoder that made them."""
    understood: list[Understood] | None = None
    """What a words model understood of each description."""

    def __post_init__(self) -> None:
        if self.descriptions is None:
            return
        if len(self.descriptions) != len(self.job.conditions or []):
            raise ValueError("expected a condition for each description")
        if self.encoder is None:
            raise ValueError("expected the encoder of the descriptions")
        if self.understood is not None and len(self.understood) != len(self.descriptions):
            raise ValueError("expected what was understood of each description")
        for each in self.understood or []:
            if len(each.probabilities) != len(CLASSES):
                raise ValueError(f"expected probabilities of {len(CLASSES)} classes")
            if not all(0 <= value <= 1 for value in (*each.probabilities, each.sureness)):
                raise ValueError("expected probabilities from 0 to 1")

    def description_of(self, index: int) -> str | None:
        """The description that model `index` is asked for by."""
        return None if self.descriptions is None else self.descriptions[index // self.job.number]

    def to_json(self) -> Any:
        """Plain JSON values."""
        return _MANIFEST.dump_python(self, mode="json")

    @classmethod
    def from_json(cls, value: Any) -> "JobManifest":
        """The manifest of parsed JSON. Settings of sampling that older files lack have their defaults.

        Raises:
            RPGError: saying what is wrong with it.
        """
        return _validated(_MANIFEST, value, "a job's manifest")


def _by_index(made: list[Made]) -> dict[int, Made]:
    return {each.model: each for each in made}


def _listed(kind: Any, schema_of: GetCoreSchemaHandler) -> CoreSchema:
    # The file holds a list of the models, since JSON's objects have no numbers for keys.
    models = schema_of.generate_schema(list[Made])
    to_list = core_schema.plain_serializer_function_ser_schema(
        lambda made: list(made.values()), return_schema=models
    )
    return core_schema.no_info_after_validator_function(_by_index, models, serialization=to_list)


@dataclass
class JobProgress:
    """How far a job is: the file `state.json`.

    `digest` is that of the generator that its models are made with, once known.
    """

    state: JobState
    digest: Sha256 | None = None
    error: str | None = None
    started: Time | None = None
    ended: Time | None = None
    made: Annotated[dict[int, Made], GetPydanticSchema(_listed)] = field(kw_only=True)
    """By index in the job."""

    def to_json(self) -> str:
        """The file's text. With a line for each number it would take twenty times as long to write."""
        return _PROGRESS.dump_json(self).decode()

    @classmethod
    def from_json(cls, value: Any, models: int) -> "JobProgress":
        """The progress of parsed JSON, of a job of so many models.

        Raises:
            RPGError: saying what is wrong with it.
        """
        progress = _validated(_PROGRESS, value, "a job's state")
        if not all(index < models for index in progress.made):
            raise RPGError("not a job's state: a model's index is out of range")
        return progress


_MANIFEST = TypeAdapter(JobManifest)
_PROGRESS = TypeAdapter(JobProgress)


def _validated(schema: TypeAdapter[T], value: Any, what: str) -> T:
    try:
        # Strict validation makes enumerations of text in JSON alone, and the value is parsed already.
        return schema.validate_json(json.dumps(value), strict=True, extra="forbid")
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in fault["loc"])
        raise RPGError(
            f"not {what}: {place}: {fault['msg']}" if place else f"not {what}: {fault['msg']}"
        ) from error
