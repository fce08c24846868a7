"""The arithmetic of a training step, against a count by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.collection.shards import ShardedCollection
from rpg.config import (
    ConditionConfig,
    ConditionKind,
    DenoiserConfig,
    GeneratorConfig,
    RecurrentConfig,
    RecurrentKind,
    RefineConfig,
    SamplingConfig,
    Solver,
    TrainConfig,
)
from rpg.generator.generator import Generator
from rpg.tasks.families import Asked
from rpg.tasks.task_loss import TaskLoss, TrainingTasks
from rpg.training.flops import refining_step_flops, step_flops
from tests.conftest import SmallNet

GENERATOR = GeneratorConfig(
    recurrent=RecurrentConfig(kind=RecurrentKind.none, width=24),
    denoiser=DenoiserConfig(width=40, depth=3),
    condition=ConditionConfig(width=12),
)
TRAIN = TrainConfig(checkpoints_per_step=6, tokens_per_checkpoint=5)


@pytest.fixture
def shards(tmp_path: Path, make_collection: Callable[..., ShardedCollection]) -> ShardedCollection:
    return make_collection(tmp_path / "shards")


def test_the_count_of_an_mlp_equals_a_count_by_hand(shards: ShardedCollection) -> None:
    tokens, token_size, width, depth, prototype, condition, hidden, frequencies = 5, 16, 40, 3, 24, 3, 12, 256
    modulations = (3 * depth + 2) * width
    # Their inputs are data, for which no gradient is computed.
    first = tokens * token_size * width + frequencies * width + condition * hidden
    rest = (
        tokens * prototype * modulations
        + tokens * depth * 2 * width * width
        + tokens * width * token_size
        + width * width
        + width * modulations
        + hidden * prototype
    )
    # A multiplication and an addition each; backward does it for the weights and for the inputs.
    by_hand = 2 * (2 * first + 3 * rest)
    assert step_flops(GENERATOR, TRAIN, shards.layout, shards.conditions) == 6 * by_hand


@pytest.mark.parametrize("kind", list(RecurrentKind))
def test_every_recurrent_network_adds_its_own(shards: ShardedCollection, kind: RecurrentKind) -> None:
    def flops(width: int, depth: int) -> int:
        recurrent = RecurrentConfig(kind=kind, width=width, depth=depth, head_size=8, state_size=8)
        return step_flops(replace(GENERATOR, recurrent=recurrent), TRAIN, shards.layout, shards.conditions)

    assert flops(24, 1) < flops(48, 1)
    if kind != RecurrentKind.none:
        assert flops(24, 1) < flops(24, 2) < flops(48, 2)


def test_asking_for_more_tokens_than_there_are_costs_nothing(shards: ShardedCollection) -> None:
    there = shards.layout.tokens
    most = replace(TRAIN, tokens_per_checkpoint=there)
    more = replace(TRAIN, tokens_per_checkpoint=there + 100)
    counted = [step_flops(GENERATOR, train, shards.layout, shards.conditions) for train in (most, more)]
    assert counted[0] == counted[1]


def test_collections_without_conditions(shards: ShardedCollection) -> None:
    for kind in (ConditionKind.none, ConditionKind.permutation):
        generator = replace(GENERATOR, condition=ConditionConfig(kind=kind))
        assert step_flops(generator, TRAIN, shards.layout, None) > 0


class Means:
    """Networks of the collection, whose outputs are to be the means of their images."""

    def build_network(self) -> nn.Module:
        return SmallNet()

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(size, 1, 4, 4, generator=random),)

    def loss(self, outputs: Tensor, batch: tuple[Tensor], condition: Asked) -> Tensor:
        return F.mse_loss(outputs[:, 0], batch[0].mean((1, 2, 3)))


def test_a_step_of_refining_counts_the_generator_and_the_networks(shards: ShardedCollection) -> None:
    assert shards.conditions is not None
    tasks = TrainingTasks(shards.conditions, [row.tolist() for row in shards.conditions])
    loss = TaskLoss(Means(), "means", torch.device("cpu"))

    def flops(steps: int = 1, networks: int = 3, samples: int = 10) -> int:
        sampling = SamplingConfig(solver=Solver.ddim, steps=steps)
        config = replace(GENERATOR, sampling=sampling)
        fitted = Generator.for_collection(config, shards.layout, shards.conditions, len(shards))
        refine = RefineConfig(tasks_per_step=7, networks_per_task=networks, samples_per_step=samples)
        return refining_step_flops(fitted, refine, tasks, loss)

    # Four 3 × 3 kernels at 16 places, whose inputs are data, and a linear layer. Backward does it for the
    # weights too, and in the linear layer for the inputs.
    network_on_sample = 2 * (2 * 4 * 9 * 16 + 3 * 4 * 18)
    assert flops(samples=25) - flops(samples=10) == 7 * 3 * 15 * network_on_sample
    tokens, token_size, width, depth = shards.layout.tokens, 16, 40, 3
    # The sampler's second step takes the denoiser's matrices anew, and a gradient flows through its input.
    once = tokens * (2 * token_size * width + depth * 2 * width * width)
    assert flops(steps=2) - flops(steps=1) > 7 * 3 * 2 * 3 * once
    assert flops(networks=6) > 1.5 * flops(networks=3)
