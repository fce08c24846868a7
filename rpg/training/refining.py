"""Refining: a fitted generator is trained on, through what its networks are for.

A step makes networks for some tasks, each from noise of its own, runs them on training data, and follows the
gradient of their loss through the networks into the generator. Networks that were fitted to checkpoints
imitate them; networks of a refined generator can be better than what it was fitted to (as with adapters of
language models in Text-to-LoRA, arXiv 2506.06105).

The loss of a task's K networks is (1 - v) · mean of their losses + v · loss of their mean output, where v is
`refine.variety`. With v near 1 the networks answer for the task together, which leaves them free to err in
different places (joint training of an ensemble, arXiv 1902.04422). What they differ by is their noise and
their permutation state.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rpg.collection.stacked_decoder import StackedDecoder
from rpg.config import ConditionConfig, ConditionKind, RefineConfig, SamplingConfig
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.plain_loop import solve
from rpg.sampling.solvers import generator_steps
from rpg.seeds import derived_seed
from rpg.tasks.families import Asked
from rpg.tasks.task_loss import TaskLoss, TrainingTasks
from rpg.training.fit import run_steps
from rpg.training.progress import TrainingProgress, Validation
from rpg.training.trainer import Trainer
from rpg.training.workers import Workers


@dataclass
class TaskBatch:
    """The networks of a step: K for each of T tasks, and the data that they run on."""

    condition: Tensor
    """T · K rows in the form that the generator's condition takes."""
    noise: Tensor
    """[draws, T · K, tokens, token_size]: what sampling starts from, and fresh noise of its steps."""
    asked: list[Asked]
    """What each of the T tasks asks for."""
    data: Any
    """From the family's `batch`."""

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        data = [leaf for leaf in tree_leaves(self.data) if isinstance(leaf, Tensor)]
        return [self.condition, self.noise, *data]


class TaskSource:
    """Draws the batches of refining: a pure function of (seed, step), whatever the number of workers.

    Every worker makes networks for its share of the tasks; all use the same data.
    """

    def __init__(
        self,
        tasks: TrainingTasks,
        loss: TaskLoss,
        generator: Generator,
        config: RefineConfig,
        seed: int,
        workers: Workers,
        device: torch.device,
    ) -> None:
        """Draw from `tasks`.

        Raises:
            RPGError: if there are fewer tasks in a step than workers.
        """
        if config.tasks_per_step < workers.count:
            raise RPGError(
                f"refine.tasks_per_step: expected at least one for each of {workers.count} training workers, "
                f"got {config.tasks_per_step}"
            )
        steps = generator_steps(generator, generator.config.sampling)
        self.device = device
        self.on_gpu = device.type == "cuda"
        # The family's code may not be made for several threads.
        self.readers = 1
        self.tokens_per_step = config.tasks_per_step * config.networks_per_task * generator.layout.tokens
        self._tasks = tasks
        self._loss = loss
        self._config = config
        self._seed = seed
        self._rows = workers.rows(config.tasks_per_step)
        self._kind = generator.config.condition.kind
        self._states = _states(generator.config.condition)
        self._draws = 1 + max((i + 1 for i, step in enumerate(steps) if step.noise), default=0)
        self._shape = (generator.layout.tokens, generator.layout.token_size)

    def batch(self, step: int) -> TaskBatch:
        """This worker's part of the batch of step number `step`."""
        config, each = self._config, self._config.networks_per_task
        random = torch.Generator().manual_seed(derived_seed(self._seed, "tasks", step))
        tasks = torch.randint(len(self._tasks.asked), (config.tasks_per_step,), generator=random)
        states = torch.stack([self._drawn_states(random) for _ in range(config.tasks_per_step)])
        own = tasks[self._rows.start : self._rows.stop]
        states = states[self._rows.start : self._rows.stop].flatten()
        noise = torch.empty(self._draws, len(own), each, *self._shape, device=self.device)
        for row in range(len(own)):
            number = step * config.tasks_per_step + self._rows.start + row
            of_task = torch.Generator(self.device)
            of_task.manual_seed(derived_seed(self._seed, "task noise", number))
            noise[:, row] = torch.randn(noise[:, row].shape, generator=of_task, device=self.device)
        samples = torch.Generator().manual_seed(derived_seed(self._seed, "samples", step))
        return TaskBatch(
            self._conditions(own.repeat_interleave(each), states).to(self.device),
            noise.flatten(1, 2),
            [self._tasks.asked[task] for task in own.tolist()],
            self._loss.batch(config.samples_per_step, samples),
        )

    def _drawn_states(self, random: torch.Generator) -> Tensor:
        """States of the networks of one task: different ones, if there are enough."""
        wanted = self._config.networks_per_task
        if self._states < wanted:
            return torch.randint(max(self._states, 1), (wanted,), generator=random)
        return torch.randperm(self._states, generator=random)[:wanted]

    def _conditions(self, tasks: Tensor, states: Tensor) -> Tensor:
        if self._kind == ConditionKind.permutation:
            return states
        if self._tasks.conditions is None:
            return torch.zeros(len(tasks), 0)
        rows = self._tasks.conditions[tasks]
        return torch.cat([rows, states[:, None]], 1) if self._states else rows


class TaskObjective:
    """The loss of a batch's networks in their tasks: an `Objective` of training."""

    def __init__(
        self,
        loss: TaskLoss,
        generator: Generator,
        config: RefineConfig,
        sampling: SamplingConfig,
        reference: Generator | None,
        device: torch.device,
    ) -> None:
        """Make networks of `generator` as `sampling` says.

        Args:
            loss: of networks.
            generator: that is refined, or one with its layout and diffusion.
            config: how the loss is put together.
            sampling: settings; gradients flow through all steps.
            reference: the generator as it was fitted, on `device`, if `config.anchor` asks for it.
            device: of the generator; networks run where the loss does.
        """
        self._loss = loss
        self._config = config
        self._sampling = sampling
        self._steps = generator_steps(generator, sampling)
        self._decoder = StackedDecoder(generator.layout, loss.device)
        self._mask = generator.layout.mask().to(device)
        self._reference = reference
        self._device = device

    def __call__(self, generator: Generator, batch: TaskBatch) -> tuple[Tensor, Tensor]:
        """Losses of the tasks of `batch`, and what each counts: 1. Both [T]."""
        config, tasks = self._config, len(batch.asked)
        tokens = sample_tokens(generator, batch, self._steps, self._sampling)
        # Weights are differences of large and small values, and families choose their own precision.
        with torch.autocast(self._device.type, enabled=False):
            networks = self._decoder(tokens.float().to(self._loss.device))
            outputs = self._loss.outputs(networks, batch.data)
            asked = [each for each in batch.asked for _ in range(config.networks_per_task)]
            losses = self._loss.losses(outputs, batch.data, asked).view(tasks, -1).mean(1)
            if config.variety and config.networks_per_task > 1:
                together = outputs.unflatten(0, (tasks, -1)).mean(1)
                losses = torch.lerp(
                    losses, self._loss.losses(together, batch.data, batch.asked), config.variety
                )
            losses = losses.to(self._device)
        if self._reference is not None:
            with torch.no_grad():
                before = sample_tokens(self._reference, batch, self._steps, self._sampling)
            squares = ((tokens - before) ** 2 * self._mask).sum((1, 2)) / self._mask.sum()
            losses = losses + config.anchor * squares.view(tasks, -1).mean(1)
        return losses, torch.ones_like(losses)


def sample_tokens(
    generator: Generator, batch: TaskBatch, steps: Sequence[Any], sampling: SamplingConfig
) -> Tensor:
    """Tokens of a batch's networks, [T · K, tokens, token_size], through which gradients flow back."""
    condition = batch.condition
    if states := generator.config.condition.states:
        # The generator as it was fitted may have fewer.
        condition = torch.cat([condition[:, :-1], condition[:, -1:] % states], 1)
    prototypes = unconditional = generator.prototypes(condition).flatten(0, 1)
    if sampling.guidance != 1:
        dropped = torch.ones(len(condition), dtype=torch.bool, device=condition.device)
        unconditional = generator.prototypes(condition, dropped).flatten(0, 1)
    tokens = solve(
        generator,
        steps,
        prototypes,
        unconditional,
        lambda draw: batch.noise[draw].flatten(0, 1),
        sampling.guidance,
        sampling.temperature,
        sampling.clip,
    )
    return tokens.view(batch.noise.shape[1:])


def new_refiner(
    fitted: Generator,
    loss: TaskLoss,
    config: RefineConfig,
    sampling: SamplingConfig,
    seed: int,
    device: torch.device,
) -> Trainer:
    """A trainer at step 0 that refines `fitted`.

    Args:
        fitted: the generator as it was fitted; it is left alone.
        loss: of networks in their tasks.
        config: settings.
        sampling: how networks are made; the refined generator's own from then on.
        seed: of the run, which determines the states that are added.
        device: where networks are made.
    """
    fresh = with_states(fitted, config.states, sampling, seed)
    reference = fitted.eval().requires_grad_(False).to(device) if config.anchor else None
    objective = TaskObjective(loss, fresh, config, sampling, reference, device)
    return Trainer(fresh, config, device, objective)


def refine(
    trainer: Trainer,
    tasks: TrainingTasks,
    loss: TaskLoss,
    seed: int,
    on_log: Callable[[TrainingProgress], None],
    on_save: Callable[[Trainer, TrainingProgress], None],
    validate: Callable[[Generator], Validation] | None = None,
    seconds: float = 0.0,
) -> None:
    """Refine the trainer's generator on `tasks`, with the arguments of `rpg.training.fit.run_steps`.

    Raises:
        RPGError: if the loss stops being a number, or the family's code fails.
    """
    config = trainer.config
    assert isinstance(config, RefineConfig)
    source = TaskSource(tasks, loss, trainer.generator, config, seed, trainer.workers, trainer.device)
    run_steps("refine", trainer, source, on_log, on_save, validate, seconds)


def with_states(fitted: Generator, states: int, sampling: SamplingConfig, seed: int) -> Generator:
    """A copy of a generator with `states` permutation states; 0: as many as it has.

    A state that is new starts as one of those that are there, moved by noise.

    Raises:
        RPGError: if it has more, or its condition has no room for any.
    """
    condition, known = fitted.config.condition, _states(fitted.config.condition)
    if states and states < known:
        raise RPGError(f"refine.states: the fitted generator has {known}, got {states}; expected 0 or more")
    if states and condition.kind != ConditionKind.vector:
        raise RPGError(
            f"refine.states: expected 0 beside generator.condition.kind '{condition.kind}', got {states}"
        )
    if condition.kind == ConditionKind.vector:
        condition = dataclasses.replace(condition, states=max(states, condition.states))
    config = dataclasses.replace(fitted.config, condition=condition, sampling=sampling)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "states", 0))
        generator = Generator(config, fitted.layout)
        state = fitted.state_dict()
        name = "condition.state.weight"
        if states > known:
            added = generator.state_dict()[name][known:]
            if known:
                rows = state[name]
                added = added + rows[torch.arange(known, states) % known]
                added = torch.cat([rows, added])
            state[name] = added
        generator.load_state_dict(state)
    generator.encoder_directory = fitted.encoder_directory
    return generator


def _states(config: ConditionConfig) -> int:
    """How many permutation states networks of one task can have."""
    return config.size if config.kind == ConditionKind.permutation else config.states
