"""A run: one section for each stage of the flow, from collecting checkpoints to the report."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any

from annotated_types import Ge, Gt, Interval

from rpg.config.bounds import Count, Expected, Finite, Seed, check_bounds
from rpg.config.generator import GeneratorConfig, TokenDtype, validate_generator
from rpg.errors import RPGError


class Normalisation(StrEnum):
    """How a tensor's values become token values (see `rpg.collection.layout`)."""

    residual = "residual"
    zscore = "zscore"


class TokenCut(StrEnum):
    """What a token may hold: values of one tensor, whole output channels of one, or of all in a row."""

    by_tensor = "by_tensor"
    by_output_channel = "by_output_channel"
    flat = "flat"


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
    """Making a collection of networks that are fine-tuned for every task of a family (stage `collect`)."""

    directory: str = ""
    """A collection that is there already (see `rpg register`), a directory or URI, used as it is instead of
    training one."""
    images: str = ""
    """Directory or URI of the images, for a task family that takes some (`docs/families.md`: Parquet files, a
    folder for each class, or what torchvision stores)."""
    encoder: str = ""
    """Directory of an encoder of descriptions that gives conditions of the family's tasks, such as
    models/cifar10-words; the collection and the generator keep a copy. Empty: none."""
    checkpoints_per_task: Count = 3
    """Networks of each task; where the collection has no conditions, networks in all."""
    heldout_checkpoints_per_task: Annotated[int, Ge(0)] = 0
    """The same for held-out tasks, whose networks are what reports compare with; 0: as for all tasks."""
    backbone_epochs: Count = 40
    epochs: Count = 6
    batch_size: Count = 32
    learning_rate: Annotated[Finite, Gt(0)] = 1e-2
    models_per_batch: Count = 32
    """Models that train side by side in one Ray task."""
    validation_tasks: Annotated[int, Ge(0)] = 40
    """Tasks that the generator is not trained on, for choosing settings; never the held-out ones."""


@dataclass
class ShardConfig:
    """Cutting a collection into tokens (stage `shard`)."""

    token_size: Count = 256
    normalisation: Normalisation = Normalisation.residual
    dtype: TokenDtype = TokenDtype.float32
    checkpoints_per_shard: Count = 512
    """Largest number; a shard holds fewer where it reaches `megabytes_per_shard` before."""
    megabytes_per_shard: Count = 256
    """A shard holds as many checkpoints as fit, and at least one."""
    cut: TokenCut = TokenCut.by_tensor


@dataclass
class OptimiserConfig:
    """How weights are changed in a number of steps, how often they are saved, and what chooses among them."""

    steps: Count = 2000
    learning_rate: Annotated[Finite, Gt(0)] = 2e-3
    warmup_steps: Annotated[int, Ge(0)] = 100
    weight_decay: Annotated[Finite, Ge(0)] = 0.0
    gradient_clip: Annotated[Finite, Gt(0)] = 1.0
    ema_decay: Annotated[Finite, Interval(ge=0, lt=1)] = 0.999
    precision: Precision = Precision.auto
    optimiser: Optimiser = Optimiser.adamw
    save_every: Count = 500
    """Steps between training checkpoints."""
    keep: Count = 2
    """Newest training checkpoints that are kept, besides the best one."""
    validate_every: Annotated[int, Ge(0)] = 0
    """Steps between generating networks for the validation tasks, whose score chooses the generator;
    0: never, and the last step's generator is taken."""
    validation_models: Count = 1
    """Networks generated for each validation task; where the generator takes no conditions, networks in
    all."""
    log_every: Count = 50


@dataclass
class TrainConfig(OptimiserConfig):
    """Fitting a generator to checkpoints (stage `train`)."""

    checkpoints_per_step: Count = 64
    tokens_per_checkpoint: Count = 16
    """Tokens sampled of each checkpoint; a step reads only those."""
    sharding: Sharding = Sharding.none


@dataclass
class RefineConfig(OptimiserConfig):
    """Training a fitted generator on, through what its networks are for (stage `refine`)."""

    steps: Annotated[int, Ge(0)] = 0
    """0: the generator stays as it was fitted. Networks are made through the steps of
    `generator.sampling`, and gradients flow back through all of them; one or a few suffice."""
    learning_rate: Annotated[Finite, Gt(0)] = 5e-4
    warmup_steps: Annotated[int, Ge(0)] = 50
    ema_decay: Annotated[Finite, Interval(ge=0, lt=1)] = 0.995
    tasks_per_step: Count = 16
    networks_per_task: Count = 4
    samples_per_step: Count = 256
    """Training samples of a step, the same for all its networks."""
    states: Annotated[int, Ge(0)] = 0
    """Permutation states of the refined generator, at least as many as the fitted one has. Networks of one
    task differ by them; 0: as many as it has."""
    variety: Annotated[Finite, Interval(ge=0, le=1)] = 0.95
    """Share of the loss that the networks of a task answer for together, by the mean of their outputs. The
    rest each answers for alone. The more they do together, the more they differ."""
    anchor: Annotated[Finite, Ge(0)] = 0.0
    """Weight of the squared distance between what the generator makes and what it made before, in
    normalised values."""


@dataclass
class GenerateConfig:
    """Which networks to generate (stage `generate`)."""

    split: Split = Split.heldout
    """Whose tasks are generated for as unseen ones: the held-out ones, or those for choosing settings."""
    models_per_task: Count = 5
    """Models for each task; where the collection has no conditions, models in all."""
    seen_tasks: Annotated[int, Ge(0)] = 20
    """Tasks of the training set to generate for as well."""
    models_per_batch: Count = 50
    """Models that one worker makes at a time; a lost batch is made again."""
    recompute_batchnorm: bool = False
    """Replace BatchNorm's running statistics, which are generated like all else, by those of training data,
    which the task family's `batch` gives. The report shows for some networks whether that is better."""


@dataclass
class JudgeConfig:
    """A command that measures networks in place of a task family."""

    command: str = ""
    """Such as `python test.py {checkpoint}`. Its last line is a number, or a JSON object of numbers by name;
    it may take {condition} and {split} as well. Empty: the task family measures."""
    directory: str = ""
    """Where the command runs; empty: where the job was started, or beside the service's file."""
    metric: str = ""
    """The metric of the command that counts; empty: the first one that it prints."""
    higher_is_better: bool = True
    """Whether this metric is to be as high as possible."""
    time_limit: Annotated[Finite, Gt(0)] = 600.0
    """Seconds that measuring one network may take, by a task family as well."""


@dataclass
class EvaluateConfig(JudgeConfig):
    """What the report measures (stage `evaluate`)."""

    noise_levels: Annotated[list[Annotated[Finite, Gt(0)]], Expected("positive values")] = field(
        default_factory=lambda: [0.01, 0.02, 0.03, 0.04, 0.05]
    )
    """Noised originals, the yardstick of similarity: noise as a share of each tensor's standard deviation."""
    ridge_penalty: Annotated[Finite, Ge(0)] = 1e-3
    """Penalty of the ridge regressions from condition to weights."""


@dataclass
class TuneConfig:
    """Searching settings (job `tune`)."""

    space: dict[str, Any] = field(default_factory=dict)
    """Keys of the config (dotted) and what to try: a list of values, or a range {min, max, log, integer}."""
    trials: Count = 12
    compute: Annotated[Finite, Gt(0)] = 1.0
    """What each trial may spend, as a share of the arithmetic that training with the config itself takes."""
    reduction: Annotated[int, Ge(2)] = 3
    """ASHA: at each rung one in `reduction` trials goes on, with `reduction` times the compute."""
    concurrent: Annotated[int, Ge(0)] = 0
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

    num_cpus: Count | None = None
    """CPUs of a Ray that the job itself starts; None: all of the machine's."""
    use_gpu: bool = False
    """One GPU for each training worker, for each generating worker, for a task that trains or evaluates
    networks of a family that uses one (cifar10), and for each run of `evaluate.command`."""
    train_workers: Count = 1
    min_train_workers: Annotated[int, Ge(0)] = 0
    """Training starts with so few and grows up to `train_workers` when there is room; 0: it starts
    with `train_workers`."""
    train_threads: Annotated[int, Ge(0)] = 0
    """PyTorch threads of a training worker; 0: its share of its machine's CPUs."""
    generate_workers: Annotated[int, Ge(0)] = 0
    """Workers that generate networks; 0: as many as the cluster has GPUs, or CPUs without `use_gpu`."""
    wait_seconds: Annotated[Finite, Ge(0)] = 0.0
    """Time that an autoscaling cluster has to bring what the job needs before the job is refused."""
    cache_directory: str = "~/.cache/rpg"
    """Where a node keeps copies of shards and generators that lie behind a URI."""
    cache_gigabytes: Annotated[Finite, Gt(0)] = 100.0
    """Size limit of `cache_directory`; what was used longest ago is removed first."""


@dataclass
class Config:
    """One run, from checkpoints to report."""

    name: str = "run"
    output: str = "runs/${name}"
    """Directory or URI that holds every stage's output."""
    seed: Seed = 0
    tasks: str = ""
    """Task family, which trains and measures networks (`docs/families.md`): digits, cifar10, a network as
    torchvision:NAME or timm:NAME, or a class of your own as FILE.py:CLASS or MODULE:CLASS. Empty: the one
    that the collection names."""
    collect: CollectConfig = field(default_factory=CollectConfig)
    shard: ShardConfig = field(default_factory=ShardConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    refine: RefineConfig = field(default_factory=RefineConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ray: RayConfig = field(default_factory=RayConfig)


def validate(config: Config) -> None:
    """Check ranges and combinations.

    Raises:
        RPGError: naming the key and the range expected.
    """
    check_bounds(config)
    if config.generate.split == Split.train:
        raise RPGError("generate.split: expected validation or heldout: training tasks are not unseen")
    if config.ray.min_train_workers > config.ray.train_workers:
        raise RPGError(
            f"ray.min_train_workers: expected at most ray.train_workers = {config.ray.train_workers}, "
            f"got {config.ray.min_train_workers}"
        )
    validate_generator(config.generator, prefix="generator.")
