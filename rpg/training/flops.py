"""How much arithmetic a training step takes, to compare generators of different sizes at equal cost."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from rpg.collection.layout import Layout
from rpg.config import ConditionKind, GeneratorConfig, RefineConfig, TrainConfig
from rpg.generator.generator import Batch, Generator
from rpg.tasks.task_loss import TaskLoss, TrainingTasks
from rpg.training.refining import TaskObjective, TaskSource, with_states
from rpg.training.workers import Workers


def step_flops(
    generator: GeneratorConfig, train: TrainConfig, layout: Layout, conditions: torch.Tensor | None
) -> int:
    """Floating-point operations of a training step's matrix products and convolutions, forward and backward.

    One checkpoint's share is run and counted; the others take as many. The optimiser is left out, since its
    work does not depend on the batch.

    Args:
        generator: the generator's configuration.
        train: gives the batch sizes.
        layout: of the collection.
        conditions: [checkpoints, width], or None if the collection has none.
    """
    # A permutation state is a row of a table, read without arithmetic.
    generator = replace(generator, condition=replace(generator.condition, states=0))
    built = Generator.for_collection(generator, layout, conditions, 1)
    kind, tokens = generator.condition.kind, min(train.tokens_per_checkpoint, layout.tokens)
    if kind == ConditionKind.permutation:
        condition = torch.zeros(1, dtype=torch.int64)
    elif kind == ConditionKind.vector and conditions is not None:
        condition = conditions[:1]
    else:
        condition = torch.zeros(1, 0)
    values = torch.randn(1, tokens, layout.token_size)
    with _without_onednn(), FlopCounterMode(display=False) as counter:
        batch = Batch(
            tokens=values,
            mask=torch.ones_like(values, dtype=torch.bool),
            indices=torch.arange(tokens)[None],
            condition=condition,
            t=torch.zeros(1, dtype=torch.int64),
            noise=torch.randn_like(values),
        )
        torch.autograd.backward(built.loss(batch).sum())
    return int(counter.get_total_flops()) * train.checkpoints_per_step


def refining_step_flops(fitted: Generator, config: RefineConfig, tasks: TrainingTasks, loss: TaskLoss) -> int:
    """Floating-point operations of a step of refining, of the generator and of the networks that it makes.

    One task's share is run and counted on the CPU.

    Args:
        fitted: the generator as it would be fitted, on the CPU, with the sampling settings that are refined
            through.
        config: settings of refining.
        tasks: that networks are made for.
        loss: of the networks, on the CPU.

    Raises:
        RPGError: if the family's code fails.
    """
    sampling, device = fitted.config.sampling, torch.device("cpu")
    generator = with_states(fitted, config.states, sampling, 0)
    reference = fitted if config.anchor else None
    objective = TaskObjective(loss, generator, config, sampling, reference, device)
    source = TaskSource(tasks, loss, generator, replace(config, tasks_per_step=1), 0, Workers(), device)
    batch = source.batch(0)
    with torch.no_grad():
        # The loss finds out at first whether networks can run side by side, which is no part of a step.
        objective(generator, batch)
    with _without_onednn(), FlopCounterMode(display=False) as counter:
        losses, _ = objective(generator, batch)
        torch.autograd.backward(losses.sum())
    return int(counter.get_total_flops()) * config.tasks_per_step


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Switch oneDNN off: the counter does not know the one operation that it computes an LSTM with."""
    with warnings.catch_warnings():
        # PyTorch also sets TF32 then, and warns about it where there is no GPU.
        warnings.simplefilter("ignore", UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield
