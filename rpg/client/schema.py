"""What goes over HTTP, as pydantic models: the service and its clients share them, and OpenAPI shows them.

Requests are taken as they are written: unknown keys, and text in the place of numbers, are refused. In
answers, keys that a newer service adds are passed over.
"""

from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from annotated_types import Interval, MinLen
from pydantic import BaseModel, ConfigDict, Field, Strict, StringConstraints, ValidationError

from rpg.config import (
    LONGEST_DESCRIPTION,
    ConditionKind,
    Count,
    Eta,
    Finite,
    Guidance,
    SamplingConfig,
    Seed,
    Solver,
    Steps,
    Temperature,
    TokenDtype,
)
from rpg.errors import RPGError

LARGEST_PRIORITY = 100

# FastAPI parses the JSON of a request first, and of a parsed text a strict model makes no enumeration.
SolverName = Annotated[Solver, Strict(False)]
DtypeName = Annotated[TokenDtype, Strict(False)]
Description = Annotated[str, Field(min_length=1, max_length=LONGEST_DESCRIPTION)]
Priority = Annotated[int, Interval(ge=-LARGEST_PRIORITY, le=LARGEST_PRIORITY)]
# A client makes files of these names, so they must not lead elsewhere.
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}$")]


# Files are named after an index, and a digest and a size are what a file is checked by.
Index = Annotated[int, Strict(), Interval(ge=0, lt=2**53)]
Size = Annotated[int, Strict(), Interval(ge=0, lt=2**63)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class JobState(StrEnum):
    """Where a job is. The last three are ends."""

    queued = "queued"
    running = "running"
    succeeded = "succeeded"
    failed = "failed"
    cancelled = "cancelled"

    @property
    def is_end(self) -> bool:
        """Whether nothing more will be made."""
        return self in (JobState.succeeded, JobState.failed, JobState.cancelled)


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", use_attribute_docstrings=True)


class SamplingRequest(_Request):
    """Which generator samples, and how; what is left out is the generator's own default."""

    generator: str = Field(min_length=1, max_length=63)
    """Name of a generator that is served."""
    seed: Seed = 0
    solver: SolverName | None = None
    steps: Steps | None = None
    """Evaluations of the denoiser."""
    guidance: Guidance | None = None
    """Classifier-free guidance; 1 is off."""
    eta: Eta | None = None
    """DDIM: 0 is deterministic."""
    temperature: Temperature | None = None
    """Scale of the starting noise."""
    dtype: DtypeName | None = None
    """Of the networks' floating-point tensors; null: as in the collection."""
    evaluate: bool = False
    """Measure every model, where the generator's `evaluates` is true."""
    priority: Priority = 0
    """Higher ones are made first; one that waits gains a priority every ten seconds."""


class JobRequest(SamplingRequest):
    """`number` models for each condition or description, or in all where the generator takes none."""

    conditions: Annotated[list[list[Finite]], MinLen(1)] | None = None
    descriptions: Annotated[list[Description], MinLen(1)] | None = None
    """In place of `conditions`, where the generator's `descriptions` is true."""
    number: Count = 1
    pack: bool = False
    """Store small networks many in a file, which is faster; they are listed and downloaded one by one all the
    same. Measured ones have files of their own."""


class GenerateRequest(SamplingRequest):
    """One model."""

    condition: list[Finite] | None = None
    description: Description | None = None
    """In place of `condition`."""


class UnderstandRequest(_Request):
    """A description, to be understood and not acted on."""

    description: Description


class _View(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """What parsed JSON says.

        Raises:
            RPGError: if it lacks something, or a value is none that is expected.
        """
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise RPGError(f"the answer {_fault(error)}: expected that of RPG's service") from None


def _fault(error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    missing = sorted({str(each["loc"][-1]) for each in faults if each["type"] == "missing"})
    if missing:
        return f"lacks {', '.join(missing)}"
    place = ".".join(str(part) for part in faults[0]["loc"])
    if faults[0]["type"] in ("model_type", "dataclass_type"):
        return f"is no object at {place}" if place else "is no object"
    return f"is wrong at {place}: {faults[0]['msg']}"


class UnderstoodClass(_View):
    """One class, and how likely a description means it."""

    name: str
    probability: float
    meant: bool
    """Whether it is 1 in the condition."""


class UnderstoodDescription(_View):
    """What a generator with a words model understood of a description."""

    classes: list[UnderstoodClass]
    """All of them, in the condition's order."""
    sureness: float
    """The share of the answers that is expected to be right, 0.5 (a guess) to 1."""
    is_sure: bool
    """Whether that is enough to make a network."""


class Job(_View):
    """A job and how far it is. Times are seconds since the epoch."""

    id: str
    owner: str
    generator: str
    digest: str | None
    """Of the generator, once it is known."""
    state: JobState
    error: str | None
    """Why it failed, or what it waits for."""
    priority: int
    seed: int
    sampling: SamplingConfig
    dtype: TokenDtype | None
    """Of the networks' floating-point tensors; null: as in the collection."""
    evaluate: bool
    understood: list[UnderstoodDescription] | None = None
    """What was understood of each description, where the generator has a words model."""
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
        return self.state.is_end


class QuarantinedJob(_View):
    """A job that cannot be read from storage."""

    id: str
    reason: str


class JobPage(_View):
    """A page of jobs, newest first; `next` goes into `after` for the following page, null at the end."""

    jobs: list[Job]
    next: str | None
    quarantined: list[QuarantinedJob]
    """For admins alone."""


class ModelFile(_View):
    """A finished model: its index in the job, the SHA-256 and the size of its weights, what it is worth."""

    index: Index
    sha256: Sha256
    bytes: Size
    accuracy: float | None
    """Share of right answers on test data, where measured."""
    similarity: float | None
    """Largest overlap of its wrong answers with those of a training network of its condition."""
    metrics: dict[str, float] | None = None
    """All that was measured, by name, the metric that counts first."""
    failure: str | None = None
    """Why it could not be measured."""
    description: str | None
    """That it was asked for by, if it was."""
    pack: str | None = None
    """The file on the service's storage that it shares with others; null: it has its own."""
    offset: Size = 0
    """Where in that it begins."""


class CompanionFile(_View):
    """A file that lies beside the weights in every model's directory, such as its configuration."""

    name: FileName
    sha256: Sha256
    bytes: Size


class ModelPage(_View):
    """A page of a job's finished models by index; `next` goes into `start` for the following page."""

    models: list[ModelFile]
    next: Index | None
    weights: FileName | None = None
    """What the file of weights is called in a model's directory; null where a model is one file."""
    companions: list[CompanionFile] = []
    """The other files in the directory of each model."""


class TensorInfo(_View):
    """A tensor of the networks that a generator makes."""

    name: str
    shape: list[int]
    dtype: str


class GeneratorInfo(_View):
    """A generator that is served. What is null is not known until its first replica has started."""

    name: str
    ready: bool
    condition: ConditionKind
    condition_size: int
    descriptions: bool
    """Whether a job may give descriptions in place of conditions."""
    classes: list[str] | None = None
    """What the condition's values stand for, where descriptions are understood as classes."""
    evaluates: bool
    """Whether a job may ask for evaluation."""
    sampling: SamplingConfig
    """Its own defaults."""
    digest: str | None
    device: str | None
    tokens: int | None
    """Tokens of a network."""
    token_size: int | None
    parameters: int | None
    """Of the generator itself."""
    model_bytes: int | None
    """Of one network's weights, without provenance."""
    models_per_second: float | None
    """Measured while jobs ran."""


class GeneratorDetail(GeneratorInfo):
    """A generator with its model card and the layout of its networks."""

    card: str | None
    layout: list[TensorInfo] | None


class GeneratorList(_View):
    """The generators that are served."""

    generators: list[GeneratorInfo]


class CentreTensor(_View):
    """A tensor of the centre at places spread evenly: value k of n is at `k * numel // n`."""

    name: str
    numel: int
    values: list[float]


class Centre(_View):
    """A sample of the mean training checkpoint, which generated networks can be compared with."""

    digest: str
    """Of the generator."""
    tensors: list[CentreTensor]
    """Those that are generated, in the layout's order."""


class Health(_View):
    """Whether jobs are taken."""

    status: Literal["ok"]
