"""Training on a GPU, where a step is a graph and the published denoiser is compiled, against plain steps."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rpg.collection.shards import ShardedCollection
from rpg.config import (
    ConditionConfig,
    DenoiserConfig,
    DenoiserKind,
    GeneratorConfig,
    Precision,
    RecurrentConfig,
    RecurrentKind,
    TokenDtype,
    TrainConfig,
)
from rpg.generator.generator import Batch
from rpg.training.batch import BatchSource
from rpg.training.fit import condition_inputs, fit, new_trainer
from rpg.training.progress import TrainingProgress
from rpg.training.trainer import Trainer
from rpg.training.workers import Workers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRAIN = TrainConfig(
    steps=6, checkpoints_per_step=4, tokens_per_checkpoint=5, warmup_steps=2, precision=Precision.float32
)
MakeCollection = Callable[..., ShardedCollection]


def generator_config(recurrent: RecurrentKind, denoiser: DenoiserKind) -> GeneratorConfig:
    return GeneratorConfig(
        recurrent=RecurrentConfig(kind=recurrent, width=16, depth=2, state_size=8, head_size=8),
        denoiser=DenoiserConfig(kind=denoiser, width=16, depth=1, channels=[1, 4, 6, 4, 1]),
        condition=ConditionConfig(width=8, dropout=0.3),
    )


@pytest.mark.parametrize("recurrent", [RecurrentKind.mamba2, RecurrentKind.lstm, RecurrentKind.transformer])
@pytest.mark.parametrize("denoiser", list(DenoiserKind))
def test_steps_on_a_gpu_are_those_on_a_cpu(
    tmp_path: Path, make_collection: MakeCollection, recurrent: RecurrentKind, denoiser: DenoiserKind
) -> None:
    shards = make_collection(tmp_path)
    config = generator_config(recurrent, denoiser)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    inputs = condition_inputs(shards, config.condition)
    source = BatchSource(shards, inputs, TRAIN, 0, 1000, 0.3, Workers(), cpu)
    trainers = [new_trainer(shards, config, TRAIN, 0, device) for device in (cpu, gpu)]
    for step in range(TRAIN.steps):
        batch = source.batch(step)
        moved = Batch(**{k: None if v is None else v.to(gpu) for k, v in vars(batch).items()})
        plain, found = trainers[0].train_step(batch), trainers[1].train_step(moved)
        for value, on_cpu in zip(found, plain, strict=True):
            torch.testing.assert_close(value.cpu(), on_cpu, rtol=1e-3, atol=1e-5)
    for one, other in zip(
        *((*t.generator.state_dict().items(), *t.average.state_dict().items()) for t in trainers), strict=True
    ):
        assert one[0] == other[0]
        if re.search(r"coder_list\.\d+\.(0\.bias|1\.0\.running_mean)$", one[0]):
            # BatchNorm takes a bias away again: its gradient is rounding, which Adam makes a whole step of.
            continue
        expected, trained = one[1], other[1].cpu()
        if one[0].endswith("qkv.bias"):
            # So does the softmax with the bias of the keys, the middle third.
            expected, trained = (
                torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (expected, trained)
            )
        torch.testing.assert_close(trained, expected, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", list(TokenDtype))
def test_batches_on_a_gpu_hold_what_is_stored(
    tmp_path: Path, make_collection: MakeCollection, dtype: TokenDtype
) -> None:
    shards = make_collection(tmp_path, dtype=dtype)
    inputs = torch.arange(len(shards))
    device = torch.device("cuda")
    batch = BatchSource(shards, inputs, TRAIN, 0, 1000, 0.0, Workers(), device).batch(3)
    assert all(tensor.is_cuda for tensor in batch.tensors())
    for row, checkpoint in enumerate(batch.condition.tolist()):
        indices = batch.indices[row].cpu()
        assert torch.equal(batch.tokens[row].cpu(), shards.read(checkpoint, indices))
        assert torch.equal(batch.mask[row].cpu(), shards.layout.mask()[indices])


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    tmp_path: Path, make_collection: MakeCollection
) -> None:
    shards = make_collection(tmp_path / "shards")
    generator = generator_config(RecurrentKind.mamba2, DenoiserKind.unet)
    config, device = replace(TRAIN, save_every=3), torch.device("cuda")

    def save(trainer: Trainer, progress: TrainingProgress) -> None:
        if progress.step == 3:
            trainer.save(tmp_path)

    whole, resumed = (new_trainer(shards, generator, config, 0, device) for _ in range(2))
    fit(whole, shards, 0, lambda progress: None, save)
    resumed.load(tmp_path)
    assert resumed.step == 3
    fit(resumed, shards, 0, lambda progress: None, lambda trainer, progress: None)
    for name, value in whole.average.state_dict().items():
        torch.testing.assert_close(resumed.average.state_dict()[name], value, rtol=1e-4, atol=1e-5)
