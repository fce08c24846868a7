"""The training loop, and fitting a generator to a sharded collection."""

import math
import resource
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from rpg.collection.retokenised import AnyShards
from rpg.config import ConditionConfig, ConditionKind, GeneratorConfig, TrainConfig
from rpg.errors import RPGError
from rpg.generator.generator import Batch, Generator
from rpg.seeds import derived_seed
from rpg.training.batch import BatchSource, Prefetch, Source
from rpg.training.gradients import Computed
from rpg.training.optimiser import learning_rate
from rpg.training.progress import NOISE_LEVELS, TrainingProgress, Validation
from rpg.training.trainer import Trainer


def new_trainer(
    shards: AnyShards,
    generator: GeneratorConfig,
    config: TrainConfig,
    seed: int,
    device: torch.device,
) -> Trainer:
    """A trainer at step 0, its weights drawn from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "weights", 0))
        fresh = Generator.for_collection(
            generator, shards.layout, shards.conditions, len(shards), shards.encoder, shards.states
        )
    return Trainer(fresh, config, device)


def fit(
    trainer: Trainer,
    shards: AnyShards,
    seed: int,
    on_log: Callable[[TrainingProgress], None],
    on_save: Callable[[Trainer, TrainingProgress], None],
    validate: Callable[[Generator], Validation] | None = None,
    seconds: float = 0.0,
) -> None:
    """Fit the trainer's generator to `shards`, the training checkpoints (`run_steps`).

    Raises:
        RPGError: if the loss stops being a number, or a step has fewer checkpoints than there are workers.
    """
    config, generator = trainer.config, trainer.generator.config
    assert isinstance(config, TrainConfig)
    source = BatchSource(
        shards,
        condition_inputs(shards, generator.condition),
        config,
        seed,
        generator.diffusion.timesteps,
        generator.condition.dropout,
        trainer.workers,
        trainer.device,
    )
    run_steps("train", trainer, source, on_log, on_save, validate, seconds)


def run_steps(
    stage: str,
    trainer: Trainer,
    source: Source,
    on_log: Callable[[TrainingProgress], None],
    on_save: Callable[[Trainer, TrainingProgress], None],
    validate: Callable[[Generator], Validation] | None = None,
    seconds: float = 0.0,
) -> None:
    """Train from `trainer.step` to the configured number of steps; all workers must call this.

    Args:
        stage: whose settings the trainer has, for messages.
        trainer: fresh or resumed.
        source: of batches; with the step number it determines each.
        on_log: called every `log_every` steps, and before `on_save`.
        on_save: called every `save_every` steps, after the last step, and after every validation.
        validate: returns the score of the moving average; the first worker calls it every `validate_every`
            steps and after the last step. None: there is no validation.
        seconds: that earlier runs, which this one resumes, spent on training.

    Raises:
        RPGError: if the loss stops being a number.
    """
    config = trainer.config
    with ExitStack() as stack:
        stack.callback(trainer.release)
        batches = stack.enter_context(Prefetch(source, trainer.step, config.steps))
        meter = _Meter(trainer, batches, source, seconds)
        while trainer.step < config.steps:
            batch = batches.next()
            meter.add(batch, trainer.train_step(batch))
            last = trainer.step == config.steps
            check = validate and config.validate_every and (last or trainer.step % config.validate_every == 0)
            save = last or trainer.step % config.save_every == 0
            if not (save or check or trainer.step % config.log_every == 0):
                continue
            progress = meter.read()
            if not math.isfinite(progress.loss):
                raise RPGError(
                    f"{stage}: the loss is {progress.loss} at step {trainer.step}: "
                    f"lower {stage}.learning_rate or {stage}.gradient_clip"
                )
            if check and validate:
                average = trainer.whole_average()
                found = validate(average) if average else Validation("", None)
                score = trainer.workers.from_first(math.nan if found.score is None else found.score)
                progress.validation_score = None if math.isnan(score) else score
                progress.validation_note = found.failure or found.metric
            on_log(progress)
            if save or check:
                on_save(trainer, progress)
            meter.start()


class _Meter:
    """Collects what `TrainingProgress` reports."""

    def __init__(self, trainer: Trainer, batches: Prefetch, source: Source, seconds: float) -> None:
        self._trainer = trainer
        self._batches = batches
        self._source = source
        self._seconds = seconds
        self._has_levels = False
        self.start()

    def start(self) -> None:
        """Begin a new report at the trainer's step."""
        self._since, self._waited = self._trainer.step, self._batches.waited
        self._began = time.perf_counter()
        device = self._trainer.device
        self._loss, self._norms = torch.zeros((), device=device), torch.zeros((), device=device)
        # For every noise level the weighted sum of losses and the sum of weights.
        self._levels = torch.zeros(2, NOISE_LEVELS, device=device)

    def add(self, batch: Any, computed: Computed) -> None:
        """Count a finished step."""
        self._loss += computed.loss
        self._norms += computed.gradient_norm
        self._has_levels = isinstance(batch, Batch)
        if isinstance(batch, Batch):
            level = batch.t * NOISE_LEVELS // self._trainer.generator.diffusion.timesteps
            weights = computed.weights
            self._levels.index_add_(1, level, torch.stack([computed.losses.float() * weights, weights]))

    def read(self) -> TrainingProgress:
        """The report since `start`; all workers must call this."""
        trainer, source = self._trainer, self._source
        mine = torch.cat([self._loss[None], self._levels.flatten()])
        (total, *sums), norms = trainer.workers.sum(mine).tolist(), float(self._norms)
        count, elapsed = trainer.step - self._since, time.perf_counter() - self._began
        self._seconds += elapsed
        losses, weights = sums[:NOISE_LEVELS], sums[NOISE_LEVELS:]
        by_noise = [a / b if b else None for a, b in zip(losses, weights, strict=True)]
        return TrainingProgress(
            step=trainer.step,
            steps=trainer.config.steps,
            loss=total / count,
            loss_by_noise=by_noise if self._has_levels else [],
            gradient_norm=norms / count,
            learning_rate=learning_rate(trainer.config, trainer.step - 1),
            tokens_per_second=count * source.tokens_per_step / elapsed,
            waiting_share=(self._batches.waited - self._waited) / elapsed,
            memory_bytes=_memory(trainer.device),
            workers=trainer.workers.count,
            seconds=self._seconds,
        )


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # Linux reports KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def condition_inputs(shards: AnyShards, config: ConditionConfig) -> Tensor:
    """One row a checkpoint, in the form that the generator's condition takes.

    Vectors are float32 [checkpoints, size], with a last column of state numbers if the configuration has
    states; for kind `permutation` int64 [checkpoints], for kind `none` [checkpoints, 0].
    """
    if config.kind == ConditionKind.permutation:
        return torch.arange(len(shards))
    if config.kind == ConditionKind.none or shards.conditions is None:
        return torch.zeros(len(shards), 0)
    if config.states and shards.states is not None:
        # A collection's states may be any numbers, such as seeds. The generator counts them from 0.
        counted = shards.states.unique(return_inverse=True)[1]
        return torch.cat([shards.conditions, counted[:, None]], 1)
    return shards.conditions
