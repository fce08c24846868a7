"""The training step against direct formulas, and saving and resuming."""

import copy
import math
import os
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rpg.collection.shards import ShardedCollection
from rpg.config import (
    ConditionConfig,
    ConditionKind,
    DenoiserConfig,
    DenoiserKind,
    DiffusionConfig,
    GeneratorConfig,
    Precision,
    Prediction,
    RecurrentConfig,
    RecurrentKind,
    TrainConfig,
)
from rpg.errors import RPGError
from rpg.generator.generator import Batch, Generator
from rpg.training.batch import BatchSource
from rpg.training.fit import condition_inputs, new_trainer
from rpg.training.optimiser import learning_rate
from rpg.training.trainer import STATE_FILE, Trainer
from rpg.training.workers import Workers

CPU = torch.device("cpu")
TRAIN = TrainConfig(
    steps=12,
    checkpoints_per_step=4,
    tokens_per_checkpoint=5,
    warmup_steps=3,
    gradient_clip=1e6,
    precision=Precision.float32,
)


def generator_config(
    recurrent: RecurrentKind = RecurrentKind.mamba2,
    denoiser: DenoiserKind = DenoiserKind.adaln_mlp,
    condition: ConditionKind = ConditionKind.vector,
    dropout: float = 0.0,
) -> GeneratorConfig:
    return GeneratorConfig(
        recurrent=RecurrentConfig(kind=recurrent, width=16, depth=1, state_size=8, head_size=8),
        denoiser=DenoiserConfig(kind=denoiser, width=16, depth=1, channels=[1, 4, 6, 4, 1]),
        condition=ConditionConfig(kind=condition, width=8, dropout=dropout),
        diffusion=DiffusionConfig(prediction=Prediction.v),
    )


@pytest.fixture
def shards(tmp_path: Path, make_collection: Callable[..., ShardedCollection]) -> ShardedCollection:
    return make_collection(tmp_path / "shards")


def source(shards: ShardedCollection, generator: Generator, config: TrainConfig = TRAIN) -> BatchSource:
    inputs = condition_inputs(shards, generator.config.condition)
    dropout = generator.config.condition.dropout
    return BatchSource(shards, inputs, config, 0, 1000, dropout, Workers(), CPU)


def opened(trainer: Trainer) -> Trainer:
    """Every parameter away from zero, so that gradients reach everything."""
    with torch.no_grad():
        for parameter in trainer.generator.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return trainer


def direct_loss(generator: Generator, batch: Batch) -> Tensor:
    """The mean over all sampled values of the batch of (prediction − v)²."""
    total, count = torch.zeros(()), 0
    for b in range(len(batch.t)):
        power = float(generator.diffusion.alpha_bar[batch.t[b]])
        prototypes = generator.prototypes(batch.condition[b][None])[0]
        for k, index in enumerate(batch.indices[b].tolist()):
            x0, noise, mask = batch.tokens[b, k], batch.noise[b, k], batch.mask[b, k]
            xt = math.sqrt(power) * x0 + math.sqrt(1 - power) * noise
            v = math.sqrt(power) * noise - math.sqrt(1 - power) * x0
            answer = generator.denoiser(xt[None], batch.t[b][None], prototypes[index][None])[0]
            total = total + ((answer - v)[mask] ** 2).sum()
            count += int(mask.sum())
    return total / count


def test_the_gradient_is_that_of_the_direct_formula(shards: ShardedCollection) -> None:
    trainer = opened(new_trainer(shards, generator_config(), TRAIN, 0, CPU))
    before = copy.deepcopy(trainer.generator)
    batch = source(shards, before).batch(0)
    assert not batch.mask.all()
    loss = direct_loss(before, batch)
    result = trainer.train_step(batch)
    assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert result.losses.shape == (4,)
    named = [(name, p) for name, p in before.named_parameters() if name != "condition.null"]
    gradients = torch.autograd.grad(loss, [p for _, p in named])
    trained = dict(trainer.generator.named_parameters())
    for (name, _), expected in zip(named, gradients, strict=True):
        found = trained[name].grad
        assert found is not None
        assert expected.abs().max() > 0
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
    assert result.gradient_norm.item() == pytest.approx(norm, rel=1e-4)


def test_steps_are_those_of_adamw(shards: ShardedCollection) -> None:
    """Decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101 algorithm 2), only on matrices."""
    config = replace(TRAIN, weight_decay=0.3, gradient_clip=0.05)
    trainer = opened(new_trainer(shards, generator_config(), config, 0, CPU))
    expected = {n: p.detach().double() for n, p in trainer.generator.named_parameters()}
    first = {n: torch.zeros_like(p) for n, p in expected.items()}
    second = {n: torch.zeros_like(p) for n, p in expected.items()}
    batches = source(shards, trainer.generator, config)
    for step in range(4):
        result = trainer.train_step(batches.batch(step))
        assert result.gradient_norm > 0.05
        rate, squares = learning_rate(config, step), 0.0
        for name, parameter in trainer.generator.named_parameters():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.double()
            squares += float((gradient**2).sum())
            decay = config.weight_decay if parameter.ndim > 1 else 0.0
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            corrected = first[name] / (1 - 0.9 ** (step + 1))
            scale = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            expected[name] = expected[name] * (1 - rate * decay) - rate * corrected / scale
            torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-4, atol=2e-6)
        # The optimiser saw gradients that were clipped to the configured norm.
        assert math.sqrt(squares) == pytest.approx(0.05, rel=1e-3)


def test_only_matrices_decay(shards: ShardedCollection) -> None:
    trainer = new_trainer(shards, generator_config(), replace(TRAIN, weight_decay=0.3), 0, CPU)
    decayed, others = trainer.optimiser.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in trainer.generator.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in (decayed, others)]
    assert groups[0] | groups[1] == set(names.values())
    assert not groups[0] & groups[1]
    assert {"denoiser.input.weight", "recurrent.layers.0.in_proj.weight"} <= groups[0]
    kept = ("A_log", "dt_bias", "D", "norm.weight", "conv1d.bias")
    assert {f"recurrent.layers.0.{name}" for name in kept} <= groups[1]
    assert {"denoiser.input.bias", "condition.null"} <= groups[1]


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[10 + 30] == pytest.approx(1 + math.cos(math.pi / 3))
    assert rates[100] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in pairwise(rates[10:]))
    at_once = TrainConfig(steps=10, warmup_steps=0, learning_rate=2.0)
    assert learning_rate(at_once, 0) == 2.0
    only_warm = TrainConfig(steps=5, warmup_steps=5, learning_rate=2.0)
    assert learning_rate(only_warm, 4) == 2.0


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_follows_its_recurrence(shards: ShardedCollection, decay: float) -> None:
    config = replace(TRAIN, ema_decay=decay, learning_rate=0.1)
    trainer = new_trainer(shards, generator_config(denoiser=DenoiserKind.unet), config, 0, CPU)
    expected = {name: p.detach().double() for name, p in trainer.generator.named_parameters()}
    batches = source(shards, trainer.generator)
    for step in range(5):
        trainer.train_step(batches.batch(step))
        rate = min(decay, (1 + step + 1) / (10 + step + 1))
        for name, parameter in trainer.generator.named_parameters():
            expected[name] = rate * expected[name] + (1 - rate) * parameter.detach().double()
    for name, parameter in trainer.average.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not parameter.requires_grad
    # Buffers, such as BatchNorm's statistics, are copied.
    for name, buffer in trainer.average.named_buffers():
        assert torch.equal(buffer, trainer.generator.get_buffer(name))
    assert not trainer.average.training


def contents(trainer: Trainer) -> dict[str, Tensor]:
    state = {f"generator.{k}": v for k, v in trainer.generator.state_dict().items()}
    state |= {f"average.{k}": v for k, v in trainer.average.state_dict().items()}
    for index, values in trainer.optimiser.state_dict()["state"].items():
        state |= {f"optimiser.{index}.{k}": v for k, v in values.items()}
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize(
    "config",
    [
        generator_config(dropout=0.3),
        generator_config(RecurrentKind.lstm, DenoiserKind.unet, ConditionKind.permutation),
        generator_config(RecurrentKind.transformer, condition=ConditionKind.none),
    ],
    ids=["fast", "unet", "transformer"],
)
def test_resumed_training_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, shards: ShardedCollection, config: GeneratorConfig, precision: Precision
) -> None:
    train = replace(TRAIN, precision=precision, gradient_clip=1.0)

    def steps(trainer: Trainer, until: int) -> list[float]:
        batches = source(shards, trainer.generator)
        return [float(trainer.train_step(batches.batch(s)).loss) for s in range(trainer.step, until)]

    whole = new_trainer(shards, config, train, 3, CPU)
    losses = steps(whole, 12)
    stopped = new_trainer(shards, config, train, 3, CPU)
    assert steps(stopped, 5) == losses[:5]
    stopped.save(tmp_path / "saved")
    steps(stopped, 7)
    resumed = new_trainer(shards, config, train, 8, CPU)
    torch.manual_seed(1234)
    resumed.load(tmp_path / "saved")
    assert resumed.step == 5
    assert steps(resumed, 12) == losses[5:]
    expected, found = contents(whole), contents(resumed)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_seed_determines_the_weights_and_leaves_other_randomness_alone(shards: ShardedCollection) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = new_trainer(shards, generator_config(), TRAIN, 0, CPU)
    assert torch.equal(torch.rand(3), expected)
    again = new_trainer(shards, generator_config(), TRAIN, 0, CPU)
    other = new_trainer(shards, generator_config(), TRAIN, 1, CPU)
    weights = [t.generator.state_dict()["denoiser.input.weight"] for t in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


class Malicious:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-100]),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a training state"),
        lambda path: torch.save({"step": 1}, path),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({**torch.load(path, weights_only=True), "step": "x"}, path),
    ],
    ids=["cut", "half", "empty", "text", "keys", "list", "step"],
)
def test_a_damaged_state_is_refused_by_name(
    tmp_path: Path, shards: ShardedCollection, damage: Callable[[Path], object]
) -> None:
    trainer = new_trainer(shards, generator_config(), TRAIN, 0, CPU)
    trainer.save(tmp_path)
    damage(tmp_path / STATE_FILE)
    with pytest.raises(RPGError, match=rf"{STATE_FILE}: cannot be resumed from: \S") as caught:
        trainer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_state_and_one_of_another_generator_are_refused(
    tmp_path: Path, shards: ShardedCollection
) -> None:
    trainer = new_trainer(shards, generator_config(), TRAIN, 0, CPU)
    with pytest.raises(RPGError, match=f"{STATE_FILE}: not found; expected a training state"):
        trainer.load(tmp_path)
    new_trainer(shards, generator_config(RecurrentKind.lstm), TRAIN, 0, CPU).save(tmp_path)
    with pytest.raises(RPGError, match=f"{STATE_FILE}: cannot be resumed from: .*state_dict"):
        trainer.load(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_state_is_refused_and_not_executed(
    tmp_path: Path, shards: ShardedCollection, legacy: bool
) -> None:
    trap = tmp_path / "executed"
    state = {"step": 1, "generator": Malicious(trap)}
    if legacy:
        (tmp_path / STATE_FILE).write_bytes(pickle.dumps(state))
    else:
        torch.save(state, tmp_path / STATE_FILE)
    trainer = new_trainer(shards, generator_config(), TRAIN, 0, CPU)
    with pytest.raises(RPGError, match=f"{STATE_FILE}: cannot be resumed from"):
        trainer.load(tmp_path)
    assert not trap.exists()
    assert pickle.loads(pickle.dumps(Malicious(trap))) is None
    assert trap.exists()


def test_a_full_disk_leaves_the_earlier_state(tmp_path: Path, shards: ShardedCollection) -> None:
    """The file size limit RLIMIT_FSIZE stands for the full disk."""
    new_trainer(shards, generator_config(), TRAIN, 0, CPU).save(tmp_path / "saved")
    before = (tmp_path / "saved" / STATE_FILE).read_bytes()
    script = """
        import resource, sys, torch
        from pathlib import Path
        from rpg.collection.shards import ShardedCollection
        from rpg.config import GeneratorConfig, TrainConfig
        from rpg.errors import RPGError
        from rpg.training.fit import new_trainer
        shards = ShardedCollection.open(Path(sys.argv[1]) / "shards")
        trainer = new_trainer(shards, GeneratorConfig(), TrainConfig(), 0, torch.device("cpu"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            trainer.save(Path(sys.argv[1]) / "saved")
        except RPGError as error:
            print(error)
            sys.exit(2)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    path = tmp_path / "saved" / STATE_FILE
    assert result.returncode == 2, result.stderr
    assert result.stdout.startswith(f"{path}: cannot be written: ")
    assert result.stdout.count("\n") == 1
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
