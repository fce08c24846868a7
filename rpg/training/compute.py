"""How much arithmetic a training step takes: what settings of different size are compared at."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from rpg.collection.layout import Layout
from rpg.config import ConditionKind, GeneratorConfig, TrainConfig
from rpg.generator.generator import Generator


def step_flops(
    generator: GeneratorConfig, train: TrainConfig, layout: Layout, conditions: torch.Tensor | None
) -> int:
    """Floating-point operations of the matrix products and convolutions of one training step, both ways.

    One checkpoint's share is counted as it runs, and the others' are the same. The optimiser, whose work
    does not depend on the batch, is left out.

    Args:
        generator: its configuration.
        train: its batch sizes count.
        layout: of the collection.
        conditions: [checkpoints, width], or None.
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
        loss = built.loss(
            values,
            torch.ones_like(values, dtype=torch.bool),
            torch.arange(tokens)[None],
            condition,
            torch.zeros(1, dtype=torch.int64),
            torch.randn_like(values),
        )
        torch.autograd.backward(loss.sum())
    return int(counter.get_total_flops()) * train.checkpoints_per_step


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Its LSTM is one operation, which the counter does not know."""
    with warnings.catch_warnings():
        # Switching sets TF32 as well, for GPUs that are not there.
        warnings.simplefilter("ignore", UserWarning)
        with torch.backends.mkldnn.flags(enabled=False):
            yield
