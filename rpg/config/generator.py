"""A generator: what its networks, its diffusion and its sampling can be set to."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from annotated_types import Ge, Interval, Le, MultipleOf
from pydantic import ConfigDict

from rpg.config.bounds import Count, Finite, check_bounds
from rpg.errors import RPGError

LONGEST_DESCRIPTION = 2000
"""Characters of a description. An encoder has a limit of its own, in tokens, and often a smaller one."""

Steps = Count
"""Evaluations of the denoiser."""
Guidance = Annotated[Finite, Ge(0)]
Eta = Annotated[Finite, Interval(ge=0, le=1)]
Temperature = Annotated[Finite, Ge(0)]


class RecurrentKind(StrEnum):
    """The network that turns positions and the condition into prototypes."""

    mamba2 = "mamba2"
    lstm = "lstm"
    transformer = "transformer"
    none = "none"


class Positions(StrEnum):
    """How a token's place in the network is embedded; `learned` starts as the 2-D sinusoids."""

    sinusoid_2d = "sinusoid_2d"
    sinusoid_1d = "sinusoid_1d"
    learned = "learned"


class DenoiserKind(StrEnum):
    """The network that denoises a token given its prototype; `direct` predicts it without diffusion."""

    unet = "unet"
    adaln_mlp = "adaln_mlp"
    direct = "direct"


class ConditionKind(StrEnum):
    """What the recurrent network is conditioned on besides positions."""

    permutation = "permutation"
    vector = "vector"
    none = "none"


class ConditionForm(StrEnum):
    """What a condition vector goes through; `gated` and `convolutional` are as published."""

    mlp = "mlp"
    gated = "gated"
    convolutional = "convolutional"


class Schedule(StrEnum):
    """Noise schedule of the diffusion."""

    linear = "linear"
    cosine = "cosine"


class Prediction(StrEnum):
    """What the denoiser predicts."""

    noise = "noise"
    v = "v"
    x0 = "x0"


class Solver(StrEnum):
    """Sampler of the reverse diffusion; `ddim_leading` is DDIM at the timesteps of the published code."""

    ddpm = "ddpm"
    ddim = "ddim"
    ddim_leading = "ddim_leading"
    dpmpp_2m = "dpmpp_2m"


class SamplingPrecision(StrEnum):
    """Arithmetic of matrix products in sampling, where there is a GPU; a CPU samples in float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float8 = "float8"


class TokenDtype(StrEnum):
    """Type that values are stored in: tokens in shards, tensors in networks and in a generator's file."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@dataclass
class RecurrentConfig:
    """The recurrent network."""

    kind: RecurrentKind = RecurrentKind.mamba2
    width: Annotated[int, Ge(1), MultipleOf(4)] = 256
    """Width of position embeddings and prototypes (`d_model`)."""
    depth: Count = 1
    state_size: Count = 32
    """Mamba-2: `d_state`."""
    conv_width: Count = 4
    """Mamba-2: `d_conv`."""
    expand: Count = 1
    """Mamba-2: inner width over `width`."""
    head_size: Count = 64
    """Mamba-2 and Transformer: width of one head."""
    output_width: Annotated[int, Ge(0)] = 0
    """Mamba-2: width of the last layer, and so of the prototypes; 0: `width` (`post_d_model`)."""
    positions: Positions = Positions.sinusoid_2d

    @property
    def prototype_width(self) -> int:
        """Width of the prototypes."""
        return self.output_width or self.width


@dataclass
class DenoiserConfig:
    """The denoiser."""

    kind: DenoiserKind = DenoiserKind.adaln_mlp
    width: Count = 512
    """AdaLN MLP: hidden width."""
    depth: Count = 3
    """AdaLN MLP: residual blocks."""
    channels: list[int] = field(default_factory=lambda: [1, 32, 64, 128, 64, 32, 1])
    """U-Net: channels of its layers, first and last 1."""
    kernel_size: Count = 7
    """U-Net: convolution width, odd."""


@dataclass
class ConditionConfig:
    """How the condition enters the recurrent network."""

    kind: ConditionKind = ConditionKind.vector
    size: int = 0
    """Values in the condition vector, or number of permutation states; 0: taken from the collection."""
    states: Annotated[int, Ge(-1)] = 0
    """Permutation states beside the vector; 0: none, -1: as many as the collection has."""
    width: Count = 256
    """Hidden width of the condition's network (`d_condition`)."""
    dropout: Annotated[Finite, Interval(ge=0, lt=1)] = 0.0
    """Share of training samples whose condition is dropped, for classifier-free guidance."""
    encoder: str = ""
    """Digest of the text encoder whose embeddings of descriptions the conditions are; empty: taken from the
    collection, where there is one."""
    form: ConditionForm = ConditionForm.mlp
    last_tokens: Count = 8
    """Form `gated`: the vector reaches only so many tokens, the last ones."""


@dataclass
class DiffusionConfig:
    """The forward process and what is predicted."""

    schedule: Schedule = Schedule.linear
    prediction: Prediction = Prediction.x0
    timesteps: Annotated[int, Ge(2), Le(10**6)] = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02


@dataclass
class SamplingConfig:
    """The reverse process: sampling settings in full."""

    # The service's answers hold these settings too, and OpenAPI then tells what each one means.
    __pydantic_config__ = ConfigDict(
        use_attribute_docstrings=True, json_schema_serialization_defaults_required=True
    )

    solver: Solver = Solver.dpmpp_2m
    steps: Steps = 8
    eta: Eta = 0.0
    """DDIM: 0 is deterministic, 1 adds the noise of DDPM."""
    guidance: Guidance = 1.0
    """Classifier-free guidance scale; 1 is off and needs one evaluation a step instead of two."""
    temperature: Temperature = 1.0
    """Standard deviation of the noise that sampling starts from."""
    clip: Annotated[Finite, Ge(0)] = 0.0
    """Largest magnitude of the estimate x̂ (normalised values) that a step may go by; 0: any. Where noise is
    predicted, the estimate multiplies an error by up to 1/signal."""
    token_batch: Annotated[int, Ge(1), Le(2**20)] = 256
    """Tokens denoised together; peak memory depends on this alone."""
    precision: SamplingPrecision = SamplingPrecision.auto
    """On a GPU: `auto` and `bfloat16` are bfloat16; `float8` makes the AdaLN MLP's products in 8-bit floats
    with a scale for every row, where the GPU has them and token size and width are multiples of 16, and is
    `auto` elsewhere; `float32`. Without a GPU, or without Triton: float32."""


@dataclass
class GeneratorConfig:
    """A generator: condition, recurrent network, denoiser, diffusion, and its default sampling."""

    recurrent: RecurrentConfig = field(default_factory=RecurrentConfig)
    denoiser: DenoiserConfig = field(default_factory=DenoiserConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    dtype: TokenDtype = TokenDtype.float32
    """What a saved generator's weights are stored as; computing with them is another matter
    (`sampling.precision`)."""


def validate_generator(config: GeneratorConfig, prefix: str = "") -> None:
    """Check a generator's bounds and combinations; `prefix` goes before the keys in messages.

    Raises:
        RPGError: naming the key and what was expected.
    """
    check_bounds(config, prefix)
    recurrent, denoiser, diffusion = config.recurrent, config.denoiser, config.diffusion
    if recurrent.kind == RecurrentKind.mamba2:
        # Every layer but the last has `width`, the last one that of the prototypes.
        widths = {recurrent.prototype_width: "output_width" if recurrent.output_width else "width"}
        if recurrent.depth > 1:
            widths[recurrent.width] = "width"
        for width, key in widths.items():
            if recurrent.expand * width % recurrent.head_size:
                raise RPGError(
                    f"{prefix}recurrent.head_size: expected a divisor of expand * {key} = "
                    f"{recurrent.expand * width}, got {recurrent.head_size}"
                )
    elif recurrent.output_width not in (0, recurrent.width):
        raise RPGError(
            f"{prefix}recurrent.output_width: expected 0 beside kind '{recurrent.kind}', "
            f"got {recurrent.output_width}: it is for kind 'mamba2'"
        )
    if recurrent.kind == RecurrentKind.transformer and recurrent.width % recurrent.head_size:
        raise RPGError(
            f"{prefix}recurrent.head_size: expected a divisor of width = {recurrent.width}, "
            f"got {recurrent.head_size}"
        )
    channels = denoiser.channels
    if len(channels) < 5 or len(channels) % 2 == 0 or channels[0] != 1 or channels[-1] != 1:
        raise RPGError(
            f"{prefix}denoiser.channels: expected an odd number of at least 5 values, first and last 1, "
            f"got {channels}"
        )
    if channels != channels[::-1] or min(channels) < 1:
        raise RPGError(f"{prefix}denoiser.channels: expected a palindrome of positive values, got {channels}")
    if denoiser.kernel_size % 2 == 0:
        raise RPGError(f"{prefix}denoiser.kernel_size: expected an odd value, got {denoiser.kernel_size}")
    if config.condition.states and config.condition.kind != ConditionKind.vector:
        raise RPGError(
            f"{prefix}condition.states: expected 0 beside kind '{config.condition.kind}', "
            f"got {config.condition.states}: they are for kind 'vector'"
        )
    form = config.condition.form
    if form != ConditionForm.mlp and config.condition.kind != ConditionKind.vector:
        raise RPGError(
            f"{prefix}condition.form: expected mlp beside kind '{config.condition.kind}', got {form}: "
            "the others are for kind 'vector'"
        )
    if form != ConditionForm.mlp and config.condition.dropout:
        raise RPGError(
            f"{prefix}condition.dropout: expected 0 beside form '{form}', got {config.condition.dropout}"
        )
    if denoiser.kind == DenoiserKind.direct and diffusion.prediction != Prediction.x0:
        raise RPGError(
            f"{prefix}diffusion.prediction: expected x0 beside denoiser.kind direct, "
            f"got {diffusion.prediction}"
        )
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        raise RPGError(
            f"{prefix}diffusion.beta_start, beta_end: expected 0 < start <= end < 1, "
            f"got {diffusion.beta_start}, {diffusion.beta_end}"
        )
    validate_sampling(config.sampling, config, prefix=f"{prefix}sampling.")


def validate_sampling(sampling: SamplingConfig, generator: GeneratorConfig, prefix: str = "") -> None:
    """Check sampling settings by themselves and against the generator that they are for.

    Raises:
        RPGError: naming the key, with `prefix` before it, and what was expected.
    """
    check_bounds(sampling, prefix)
    if sampling.steps > generator.diffusion.timesteps:
        raise RPGError(
            f"{prefix}steps: expected at most diffusion.timesteps = {generator.diffusion.timesteps}, "
            f"got {sampling.steps}"
        )
    if sampling.solver == Solver.ddim_leading and sampling.steps == generator.diffusion.timesteps:
        raise RPGError(
            f"{prefix}steps: expected less than diffusion.timesteps = {generator.diffusion.timesteps} "
            f"with ddim_leading, got {sampling.steps}"
        )
    if sampling.precision == SamplingPrecision.float8 and generator.denoiser.kind != DenoiserKind.adaln_mlp:
        raise RPGError(
            f"{prefix}precision: float8 needs denoiser.kind adaln_mlp, got {generator.denoiser.kind}"
        )
    if sampling.guidance != 1 and generator.condition.dropout == 0:
        raise RPGError(
            f"{prefix}guidance: needs a generator trained with condition.dropout > 0, got {sampling.guidance}"
        )
