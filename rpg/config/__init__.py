"""Configuration: dataclass schemas, YAML files, `key=value` overrides and validation.

One `Config` describes a whole run, from collecting checkpoints to the report. Every stage of the flow has
its section; a value is configured in one place only.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rpg.errors import RPGError
from rpg.storage.files import write_text
from rpg.storage.locations import AnyPath

T = TypeVar("T")

MAX_TOKEN_BATCH = 2**20
MAX_TIMESTEPS = 10**6


class Normalisation(StrEnum):
    """How a tensor's values become token values (see `rpg.collection.layout`)."""

    residual = "residual"
    zscore = "zscore"


class TokenDtype(StrEnum):
    """Type that values are stored in: tokens in shards, tensors in generated networks."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class RecurrentKind(StrEnum):
    """The network that turns positions and the condition into prototypes."""

    mamba2 = "mamba2"
    lstm = "lstm"
    transformer = "transformer"
    none = "none"


class DenoiserKind(StrEnum):
    """The network that denoises a token given its prototype."""

    unet = "unet"
    adaln_mlp = "adaln_mlp"


class ConditionKind(StrEnum):
    """What the recurrent network is conditioned on besides positions."""

    permutation = "permutation"
    vector = "vector"
    none = "none"


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
    """Sampler of the reverse diffusion."""

    ddpm = "ddpm"
    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"


class Split(StrEnum):
    """Which part of a collection a checkpoint belongs to; generators learn from `train` alone."""

    train = "train"
    validation = "validation"
    heldout = "heldout"


class Precision(StrEnum):
    """Arithmetic of matrix products in training: `auto` is float32 on a CPU and bfloat16 on a GPU."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


class SamplingPrecision(StrEnum):
    """Arithmetic of matrix products in sampling, where there is a GPU; a CPU samples in float32."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float8 = "float8"


class Optimiser(StrEnum):
    """What changes the weights; `adamw8bit` keeps its two moments in 8 bits a value."""

    adamw = "adamw"
    adamw8bit = "adamw8bit"


class Sharding(StrEnum):
    """Whether training workers each hold the whole generator, or (`fsdp`) a share of every tensor."""

    none = "none"
    fsdp = "fsdp"


@dataclass
class CollectConfig:
    """Making a collection: networks fine-tuned for every task of a family (stage `collect`)."""

    directory: str = ""
    """A collection that is there already (see `rpg register`), a directory or URI, used as it is instead of
    training one."""
    family: str = "digits"
    """Task family to train networks for (see `rpg/tasks`): digits or cifar10."""
    images: str = ""
    """Directory or URI of the images, for a family that does not bring its own (cifar10: `train.parquet` and
    `test.parquet`, see `rpg/tasks/cifar10_images.py`)."""
    checkpoints_per_task: int = 3
    backbone_epochs: int = 40
    epochs: int = 6
    batch_size: int = 32
    learning_rate: float = 1e-2
    models_per_batch: int = 32
    """Models that train side by side in one Ray task."""
    validation_tasks: int = 40
    """Tasks that the generator is not trained on, for choosing settings; never the held-out ones."""


@dataclass
class ShardConfig:
    """Cutting a collection into tokens (stage `shard`)."""

    token_size: int = 256
    normalisation: Normalisation = Normalisation.residual
    dtype: TokenDtype = TokenDtype.float32
    checkpoints_per_shard: int = 512
    """At most; fewer where `megabytes_per_shard` is reached before."""
    megabytes_per_shard: int = 256
    """A shard holds as many checkpoints as fit, and at least one."""


@dataclass
class RecurrentConfig:
    """The recurrent network."""

    kind: RecurrentKind = RecurrentKind.mamba2
    width: int = 256
    """Width of position embeddings and prototypes (`d_model`)."""
    depth: int = 1
    state_size: int = 32
    """Mamba-2: `d_state`."""
    conv_width: int = 4
    """Mamba-2: `d_conv`."""
    expand: int = 1
    """Mamba-2: inner width over `width`."""
    head_size: int = 64
    """Mamba-2 and Transformer: width of one head."""


@dataclass
class DenoiserConfig:
    """The denoiser."""

    kind: DenoiserKind = DenoiserKind.adaln_mlp
    width: int = 512
    """AdaLN MLP: hidden width."""
    depth: int = 3
    """AdaLN MLP: residual blocks."""
    channels: list[int] = field(default_factory=lambda: [1, 32, 64, 128, 64, 32, 1])
    """U-Net: channels of its layers, first and last 1."""
    kernel_size: int = 7
    """U-Net: convolution width, odd."""


@dataclass
class ConditionConfig:
    """How the condition enters the recurrent network."""

    kind: ConditionKind = ConditionKind.vector
    size: int = 0
    """Values in the condition vector, or number of permutation states; 0: taken from the collection."""
    states: int = 0
    """Permutation states beside the vector; 0: none, -1: as many as the collection has."""
    width: int = 256
    """Hidden width of the condition's MLP."""
    dropout: float = 0.0
    """Share of training samples whose condition is dropped, for classifier-free guidance."""
    encoder: str = ""
    """Digest of the text encoder whose embeddings of descriptions the conditions are; empty: taken from the
    collection, where there is one."""


@dataclass
class DiffusionConfig:
    """The forward process and what is predicted."""

    schedule: Schedule = Schedule.linear
    prediction: Prediction = Prediction.x0
    timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02


@dataclass
class SamplingConfig:
    """The reverse process."""

    solver: Solver = Solver.dpmpp_2m
    steps: int = 8
    eta: float = 0.0
    """DDIM: 0 is deterministic, 1 adds the noise of DDPM."""
    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is off and needs one evaluation a step instead of two."""
    temperature: float = 1.0
    """Standard deviation of the noise that sampling starts from."""
    clip: float = 0.0
    """Largest magnitude of the estimate x̂ (normalised values) that a step may go by; 0: any. Where noise is
    predicted, an error is multiplied by up to 1/signal in it."""
    token_batch: int = 256
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


@dataclass
class TrainConfig:
    """Fitting a generator (stage `train`)."""

    steps: int = 2000
    checkpoints_per_step: int = 64
    tokens_per_checkpoint: int = 16
    """Tokens sampled of each checkpoint; a step reads only those."""
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    ema_decay: float = 0.999
    precision: Precision = Precision.auto
    optimiser: Optimiser = Optimiser.adamw
    sharding: Sharding = Sharding.none
    save_every: int = 500
    """Steps between training checkpoints."""
    keep: int = 2
    """Training checkpoints kept: the newest, besides the best."""
    validate_every: int = 0
    """Steps between generating networks for the validation tasks, whose accuracy chooses the generator;
    0: never, and the last step's generator is taken."""
    validation_models: int = 1
    """Networks generated for each validation task."""
    log_every: int = 50


@dataclass
class GenerateConfig:
    """Which networks to generate (stage `generate`)."""

    split: Split = Split.heldout
    """Whose tasks are generated for as unseen ones: the held-out ones, or those for choosing settings."""
    models_per_task: int = 5
    """Models a task; for collections without conditions: models in all."""
    seen_tasks: int = 20
    """Tasks of the training set to generate for as well."""
    models_per_batch: int = 50
    """Models that one worker makes at a time; a lost batch is made again."""


@dataclass
class EvaluateConfig:
    """What the report measures (stage `evaluate`)."""

    noise_levels: list[float] = field(default_factory=lambda: [0.01, 0.02, 0.03, 0.04, 0.05])
    """Noised originals, the yardstick of similarity: noise as a share of each tensor's standard deviation."""
    ridge_penalty: float = 1e-3
    """Of the ridge regressions from condition to weights."""


@dataclass
class TuneConfig:
    """Searching settings (job `tune`)."""

    space: dict[str, Any] = field(default_factory=dict)
    """Keys of the config (dotted) and what to try: a list of values, or a range {min, max, log, integer}."""
    trials: int = 12
    compute: float = 1.0
    """What each trial may spend, as a share of the arithmetic that training with the config itself takes."""
    reduction: int = 3
    """ASHA: at each rung one of so many trials goes on, with so many times the compute."""
    concurrent: int = 0
    """Trials at a time; 0: as many as the cluster has room for."""


@dataclass
class TrackingConfig:
    """Where training metrics go besides the terminal."""

    tensorboard: bool = True
    """Event files in `train/` of the output."""
    mlflow: str = ""
    """An MLflow tracking URI; empty: not used."""
    wandb: str = ""
    """A Weights & Biases project; empty: not used."""


@dataclass
class RayConfig:
    """What the jobs ask of Ray."""

    num_cpus: int | None = None
    """CPUs of a Ray that the job itself starts; None: all of the machine's."""
    use_gpu: bool = False
    """One GPU for each training worker, for each generating worker, and for a task that trains or evaluates
    networks of a family that uses one (cifar10)."""
    train_workers: int = 1
    min_train_workers: int = 0
    """Start with as few and grow up to `train_workers` when there is room; 0: always `train_workers`."""
    train_threads: int = 0
    """PyTorch threads of a training worker; 0: its share of its machine's CPUs."""
    generate_workers: int = 2
    wait_seconds: float = 0.0
    """How long to wait for an autoscaling cluster to bring what the job needs before it is refused."""
    cache_directory: str = "~/.cache/rpg"
    """Where a node keeps copies of shards and generators that lie behind a URI."""
    cache_gigabytes: float = 100.0
    """Size limit of that directory; what was used longest ago goes first."""


@dataclass
class Config:
    """One run, from checkpoints to report."""

    name: str = "run"
    output: str = "runs/${name}"
    """Directory or URI that holds every stage's output."""
    seed: int = 0
    collect: CollectConfig = field(default_factory=CollectConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ray: RayConfig = field(default_factory=RayConfig)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML preset, apply `key=value` overrides (dotted keys) and validate.

    Raises:
        RPGError: for a missing or malformed file, an unknown key (the nearest valid one is named), a value
            of the wrong type, or a value out of range.
    """
    merged: Any = _read_yaml(path, Config, "a YAML config")
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator:
            raise RPGError(f"override '{override}': expected key=value")
        check_key(key, "override")
        try:
            # Replaced, not merged: a mapping such as tune.space is one value.
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            OmegaConf.update(merged, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise RPGError(f"override '{override}': {_one_line(error)}") from error
        except Exception as error:
            raise RPGError(f"override '{override}': not a valid value: {_one_line(error)}") from error
    config = _to_object(merged, path)
    assert isinstance(config, Config)
    validate(config)
    return config


def with_values(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """A copy of `config` with other values at dotted keys, not validated; `source` is named in messages.

    Raises:
        RPGError: for an unknown key or a value of the wrong type.
    """
    changed = OmegaConf.structured(config)
    for key, value in values.items():
        check_key(key, source)
        try:
            OmegaConf.update(changed, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise RPGError(f"{source}: {key}: {_one_line(error)}") from error
    result = OmegaConf.to_object(changed)
    assert isinstance(result, Config)
    return result


def generator_config_from_yaml(path: Path) -> GeneratorConfig:
    """Read a saved generator's `config.yaml`.

    Raises:
        RPGError: as `load_config`.
    """
    config = read_config(path, GeneratorConfig, "a generator's configuration")
    validate_generator(config, prefix=f"{path}: ")
    return config


def read_config(path: Path, schema: type[T], what: str) -> T:
    """Read a YAML file over the defaults of a dataclass `schema`; `what` names its role in messages.

    Raises:
        RPGError: for a missing or malformed file, an unknown key (the nearest valid one is named), or a
            value of the wrong type.
    """
    config = _to_object(_read_yaml(path, schema, what), path)
    assert isinstance(config, schema)
    return config


def save_config(config: Any, path: AnyPath) -> None:
    """Write any of this module's dataclasses as YAML that reads back to an equal object."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def to_plain(config: Any) -> Any:
    """A config as plain dictionaries, lists and scalars, for JSON and hashing."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)


def validate(config: Config) -> None:
    """Check ranges and combinations.

    Raises:
        RPGError: naming the key and the range expected.
    """
    if not 0 <= config.seed < 2**64:
        raise RPGError(f"seed: expected 0 <= seed < 2**64, got {config.seed}")
    if config.generate.split == Split.train:
        raise RPGError("generate.split: expected validation or heldout: training tasks are not unseen")
    _at_least(
        1,
        {
            "collect.checkpoints_per_task": config.collect.checkpoints_per_task,
            "collect.backbone_epochs": config.collect.backbone_epochs,
            "collect.epochs": config.collect.epochs,
            "collect.batch_size": config.collect.batch_size,
            "collect.models_per_batch": config.collect.models_per_batch,
            "shard.token_size": config.shard.token_size,
            "shard.checkpoints_per_shard": config.shard.checkpoints_per_shard,
            "shard.megabytes_per_shard": config.shard.megabytes_per_shard,
            "train.steps": config.train.steps,
            "train.checkpoints_per_step": config.train.checkpoints_per_step,
            "train.tokens_per_checkpoint": config.train.tokens_per_checkpoint,
            "train.save_every": config.train.save_every,
            "train.keep": config.train.keep,
            "train.validation_models": config.train.validation_models,
            "train.log_every": config.train.log_every,
            "generate.models_per_task": config.generate.models_per_task,
            "generate.models_per_batch": config.generate.models_per_batch,
            "tune.trials": config.tune.trials,
            "ray.train_workers": config.ray.train_workers,
            "ray.generate_workers": config.ray.generate_workers,
        },
    )
    _at_least(
        0,
        {
            "collect.validation_tasks": config.collect.validation_tasks,
            "train.warmup_steps": config.train.warmup_steps,
            "train.weight_decay": config.train.weight_decay,
            "generate.seen_tasks": config.generate.seen_tasks,
            "train.validate_every": config.train.validate_every,
            "tune.concurrent": config.tune.concurrent,
            "ray.min_train_workers": config.ray.min_train_workers,
            "ray.train_threads": config.ray.train_threads,
            "ray.wait_seconds": config.ray.wait_seconds,
            "evaluate.ridge_penalty": config.evaluate.ridge_penalty,
        },
    )
    _positive(
        {
            "collect.learning_rate": config.collect.learning_rate,
            "train.learning_rate": config.train.learning_rate,
            "train.gradient_clip": config.train.gradient_clip,
            "tune.compute": config.tune.compute,
            "ray.cache_gigabytes": config.ray.cache_gigabytes,
        }
    )
    _at_least(2, {"tune.reduction": config.tune.reduction})
    if config.ray.min_train_workers > config.ray.train_workers:
        raise RPGError(
            f"ray.min_train_workers: expected at most ray.train_workers = {config.ray.train_workers}, "
            f"got {config.ray.min_train_workers}"
        )
    if config.ray.num_cpus is not None:
        _at_least(1, {"ray.num_cpus": config.ray.num_cpus})
    if not 0 <= config.train.ema_decay < 1:
        raise RPGError(f"train.ema_decay: expected 0 <= value < 1, got {config.train.ema_decay}")
    if not all(0 < level < math.inf for level in config.evaluate.noise_levels):
        raise RPGError(f"evaluate.noise_levels: expected positive values, got {config.evaluate.noise_levels}")
    validate_generator(config.generator, prefix="generator.")


def validate_generator(config: GeneratorConfig, prefix: str = "") -> None:
    """Check a generator's ranges and combinations; `prefix` goes before the keys in messages."""
    recurrent, denoiser, diffusion = config.recurrent, config.denoiser, config.diffusion
    _at_least(
        1,
        {
            f"{prefix}recurrent.width": recurrent.width,
            f"{prefix}recurrent.depth": recurrent.depth,
            f"{prefix}recurrent.state_size": recurrent.state_size,
            f"{prefix}recurrent.conv_width": recurrent.conv_width,
            f"{prefix}recurrent.expand": recurrent.expand,
            f"{prefix}recurrent.head_size": recurrent.head_size,
            f"{prefix}denoiser.width": denoiser.width,
            f"{prefix}denoiser.depth": denoiser.depth,
            f"{prefix}denoiser.kernel_size": denoiser.kernel_size,
            f"{prefix}condition.width": config.condition.width,
        },
    )
    if recurrent.width % 4:
        raise RPGError(f"{prefix}recurrent.width: expected a multiple of 4, got {recurrent.width}")
    inner = recurrent.expand * recurrent.width
    if recurrent.kind == RecurrentKind.mamba2 and inner % recurrent.head_size:
        raise RPGError(
            f"{prefix}recurrent.head_size: expected a divisor of expand * width = {inner}, "
            f"got {recurrent.head_size}"
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
    if not 0 <= config.condition.dropout < 1:
        raise RPGError(f"{prefix}condition.dropout: expected 0 <= value < 1, got {config.condition.dropout}")
    _at_least(-1, {f"{prefix}condition.states": config.condition.states})
    if config.condition.states and config.condition.kind != ConditionKind.vector:
        raise RPGError(
            f"{prefix}condition.states: expected 0 beside kind '{config.condition.kind}', "
            f"got {config.condition.states}: they are for kind 'vector'"
        )
    _at_least(2, {f"{prefix}diffusion.timesteps": diffusion.timesteps})
    _at_most(MAX_TIMESTEPS, {f"{prefix}diffusion.timesteps": diffusion.timesteps})
    if not 0 < diffusion.beta_start <= diffusion.beta_end < 1:
        raise RPGError(
            f"{prefix}diffusion.beta_start, beta_end: expected 0 < start <= end < 1, "
            f"got {diffusion.beta_start}, {diffusion.beta_end}"
        )
    validate_sampling(config.sampling, config, prefix=f"{prefix}sampling.")


def validate_sampling(sampling: SamplingConfig, generator: GeneratorConfig, prefix: str = "") -> None:
    """Check sampling settings against the generator that they are for."""
    _at_least(1, {f"{prefix}steps": sampling.steps, f"{prefix}token_batch": sampling.token_batch})
    _at_most(MAX_TOKEN_BATCH, {f"{prefix}token_batch": sampling.token_batch})
    for key in ("temperature", "guidance", "clip"):
        _at_least(0, {f"{prefix}{key}": getattr(sampling, key)})
    if sampling.steps > generator.diffusion.timesteps:
        raise RPGError(
            f"{prefix}steps: expected at most diffusion.timesteps = {generator.diffusion.timesteps}, "
            f"got {sampling.steps}"
        )
    if not 0 <= sampling.eta <= 1:
        raise RPGError(f"{prefix}eta: expected 0 <= value <= 1, got {sampling.eta}")
    if sampling.precision == SamplingPrecision.float8 and generator.denoiser.kind != DenoiserKind.adaln_mlp:
        raise RPGError(
            f"{prefix}precision: float8 needs denoiser.kind adaln_mlp, got {generator.denoiser.kind}"
        )
    if sampling.guidance != 1 and generator.condition.dropout == 0:
        raise RPGError(
            f"{prefix}guidance: needs a generator trained with condition.dropout > 0, got {sampling.guidance}"
        )


def _at_least(minimum: float, values: dict[str, float]) -> None:
    for key, value in values.items():
        if not minimum <= value < math.inf:
            raise RPGError(f"{key}: expected a finite value of at least {minimum}, got {value}")


def _at_most(maximum: int, values: dict[str, int]) -> None:
    for key, value in values.items():
        if value > maximum:
            raise RPGError(f"{key}: expected at most {maximum}, got {value}")


def _positive(values: dict[str, float]) -> None:
    for key, value in values.items():
        if not 0 < value < math.inf:
            raise RPGError(f"{key}: expected a finite value above 0, got {value}")


def _read_yaml(path: Path, schema: type, what: str) -> DictConfig:
    """The schema's defaults with a file's values; `what` names the file's role in error messages."""
    try:
        given = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found; expected {what}") from error
    except Exception as error:
        raise RPGError(f"{path}: not valid YAML: {_one_line(error)}") from error
    if not isinstance(given, DictConfig):
        raise RPGError(f"{path}: expected a mapping of sections, found {type(given).__name__}")
    _refuse_unknown_keys(OmegaConf.to_container(given), schema, prefix="", source=str(path))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
    except OmegaConfBaseException as error:
        raise RPGError(f"{path}: {_one_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _to_object(merged: Any, path: Path) -> Any:
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise RPGError(f"{path}: {_one_line(error)}") from error


def _refuse_unknown_keys(given: Any, schema: Any, prefix: str, source: str) -> None:
    if not isinstance(given, dict):
        return
    types = {f.name: f.type for f in fields(schema)}
    for key, value in given.items():
        if key not in types:
            raise RPGError(f"{source}: unknown key '{prefix}{key}'{_nearest(str(key), list(types), prefix)}")
        if is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise RPGError(f"{source}: '{prefix}{key}' is a section: expected a mapping, got {value!r}")
            _refuse_unknown_keys(value, types[key], prefix=f"{prefix}{key}.", source=source)
        elif isinstance(value, list) and is_dataclass(item := _item_type(types[key])):
            for i, each in enumerate(value):
                if not isinstance(each, dict):
                    raise RPGError(f"{source}: '{prefix}{key}[{i}]': expected a mapping, got {each!r}")
                _refuse_unknown_keys(each, item, prefix=f"{prefix}{key}[{i}].", source=source)


def _item_type(kind: Any) -> Any:
    """What a list holds by its type, None for other types."""
    return next(iter(get_args(kind)), None) if get_origin(kind) is list else None


def check_key(dotted: str, source: str) -> None:
    """Check that there is a value, not a section, at a dotted key; `source` is named in messages.

    Raises:
        RPGError: naming the key, and the nearest valid one.
    """
    schema: Any = Config
    prefix = ""
    for part in dotted.split("."):
        names = {f.name: f.type for f in fields(schema)} if is_dataclass(schema) else {}
        if part not in names:
            raise RPGError(f"{source}: unknown key '{dotted}'{_nearest(part, list(names), prefix)}")
        schema = names[part]
        prefix += f"{part}."
    if is_dataclass(schema):
        raise RPGError(
            f"{source}: '{dotted}' is a section; expected one of its keys, such as "
            f"'{dotted}.{fields(schema)[0].name}'"
        )


def _nearest(key: str, valid: list[str], prefix: str) -> str:
    found = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if found:
        return f"; did you mean '{prefix}{found[0]}'?"
    return f"; expected one of {', '.join(prefix + name for name in valid)}" if valid else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
