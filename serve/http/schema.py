"""What goes over HTTP, as pydantic models: OpenAPI is made from these."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from rpg.text_encoder import LONGEST_DESCRIPTION
from serve.dispatch.records import State

DtypeName = Literal["float32", "float16", "bfloat16"]
SolverName = Literal["ddpm", "ddim", "dpmpp_2m"]
PrecisionName = Literal["auto", "float32", "bfloat16", "float8"]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Description = Annotated[str, Field(min_length=1, max_length=LONGEST_DESCRIPTION)]

LARGEST_PRIORITY = 100


class Strict(BaseModel):
    """JSON is taken as it is written: no text for numbers, no unknown keys."""

    model_config = ConfigDict(strict=True, extra="forbid")


class SamplingRequest(Strict):
    """Which generator samples, and how; what is left out is the generator's own default."""

    generator: str = Field(min_length=1, max_length=63, description="name of a generator that is served")
    seed: int = Field(0, ge=0, lt=2**64)
    solver: SolverName | None = None
    steps: int | None = Field(None, ge=1, description="evaluations of the denoiser")
    guidance: Finite | None = Field(None, ge=0, description="classifier-free guidance; 1 is off")
    eta: Finite | None = Field(None, ge=0, le=1, description="DDIM: 0 is deterministic")
    temperature: Finite | None = Field(None, ge=0, description="scale of the starting noise")
    dtype: DtypeName | None = Field(
        None, description="of the networks' floating-point tensors; null: as in the collection"
    )
    evaluate: bool = Field(
        False, description="measure every model, where the generator's `evaluates` is true"
    )
    priority: int = Field(
        0,
        ge=-LARGEST_PRIORITY,
        le=LARGEST_PRIORITY,
        description="higher ones are made first; one that waits gains a priority every ten seconds",
    )


class JobRequest(SamplingRequest):
    """`number` models for each condition or description, or in all where the generator takes none."""

    conditions: list[list[Finite]] | None = Field(None, min_length=1)
    descriptions: list[Description] | None = Field(
        None,
        min_length=1,
        description="in place of `conditions`, where the generator's `descriptions` is true",
    )
    number: int = Field(1, ge=1)


class ModelRequest(SamplingRequest):
    """One model."""

    condition: list[Finite] | None = None
    description: Description | None = Field(None, description="in place of `condition`")


class Sampling(BaseModel):
    """Sampling settings in full."""

    solver: SolverName
    steps: int
    eta: float
    guidance: float
    temperature: float
    clip: float
    token_batch: int
    precision: PrecisionName


class JobView(BaseModel):
    """A job and how far it is. Times are seconds since the epoch."""

    id: str
    owner: str
    generator: str
    digest: str | None = Field(description="of the generator, once it is known")
    state: State
    error: str | None = Field(description="why it failed, or what it waits for")
    priority: int
    seed: int
    sampling: Sampling
    dtype: DtypeName | None
    evaluate: bool
    accuracy: float | None = Field(description="mean of the finished models', where it is measured")
    models: int = Field(description="models asked for; model i is for condition or description i // number")
    number: int
    finished: int = Field(description="models that can be downloaded")
    bytes: int = Field(description="of all finished models")
    created: float
    started: float | None
    ended: float | None
    models_per_second: float | None
    seconds_left: float | None
    version: int = Field(description="another one whenever something has changed")


class QuarantinedView(BaseModel):
    """A job that cannot be read from storage."""

    id: str
    reason: str


class JobList(BaseModel):
    """A page of jobs, newest first; `next` goes into `after` for the following page."""

    jobs: list[JobView]
    next: str | None
    quarantined: list[QuarantinedView] = Field(description="for admins alone")


class ModelView(BaseModel):
    """A finished model."""

    index: int
    sha256: str
    bytes: int
    accuracy: float | None = Field(description="share of right answers on test images, where measured")
    similarity: float | None = Field(
        description="largest overlap of its wrong answers with those of a training network of its condition"
    )
    description: str | None = Field(description="that it was asked for by, if it was")


class ModelList(BaseModel):
    """A page of a job's finished models by index; `next` goes into `start` for the following page."""

    models: list[ModelView]
    next: int | None


class TensorView(BaseModel):
    """A tensor of the networks that a generator makes."""

    name: str
    shape: list[int]
    dtype: str


class GeneratorView(BaseModel):
    """A generator. What is null is not known until its first replica has started."""

    name: str
    ready: bool
    condition: Literal["vector", "permutation", "none"]
    condition_size: int
    descriptions: bool = Field(description="whether a job may give descriptions in place of conditions")
    evaluates: bool = Field(description="whether a job may ask for evaluation")
    sampling: Sampling
    digest: str | None
    device: str | None
    tokens: int | None = Field(description="tokens of a network")
    token_size: int | None
    parameters: int | None = Field(description="of the generator itself")
    model_bytes: int | None = Field(description="of one network's file, without provenance")
    models_per_second: float | None = Field(description="measured while jobs ran")


class GeneratorDetail(GeneratorView):
    """A generator with its model card and the layout of its networks."""

    card: str | None
    layout: list[TensorView] | None


class CentreTensor(BaseModel):
    """A tensor of the centre at places spread evenly: value k of n is at `k * numel // n`."""

    name: str
    numel: int
    values: list[float]


class Centre(BaseModel):
    """A sample of the mean training checkpoint, which generated networks can be compared with."""

    digest: str = Field(description="of the generator")
    tensors: list[CentreTensor] = Field(description="those that are generated, in the layout's order")


class GeneratorList(BaseModel):
    """The generators that are served."""

    generators: list[GeneratorView]


class Health(BaseModel):
    """Whether jobs are taken."""

    status: Literal["ok"]
