"""The training loop: when it calls its callbacks, resuming, and that the loss falls."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rpg.collection.shards import ShardedCollection
from rpg.config import (
    ConditionConfig,
    ConditionKind,
    DenoiserConfig,
    DiffusionConfig,
    GeneratorConfig,
    Precision,
    Prediction,
    RecurrentConfig,
    TrainConfig,
)
from rpg.training.fit import condition_inputs, fit, new_trainer
from rpg.training.gradients import Computed
from rpg.training.progress import TrainingProgress
from rpg.training.trainer import Trainer

CPU = torch.device("cpu")
GENERATOR = GeneratorConfig(
    recurrent=RecurrentConfig(width=16, depth=1, state_size=8, head_size=8),
    denoiser=DenoiserConfig(width=64, depth=2),
    condition=ConditionConfig(width=16),
    diffusion=DiffusionConfig(prediction=Prediction.v),
)
TRAIN = TrainConfig(
    steps=11,
    checkpoints_per_step=4,
    tokens_per_checkpoint=5,
    warmup_steps=2,
    save_every=4,
    log_every=3,
    precision=Precision.float32,
)


@pytest.fixture
def shards(tmp_path: Path, make_collection: Callable[..., ShardedCollection]) -> ShardedCollection:
    return make_collection(tmp_path / "shards")


def run(
    trainer: Trainer, shards: ShardedCollection, on_save: Callable[[Trainer, TrainingProgress], None]
) -> list[TrainingProgress]:
    logged: list[TrainingProgress] = []
    fit(trainer, shards, 0, logged.append, on_save)
    return logged


def test_logs_and_saves_when_asked_and_at_the_end(shards: ShardedCollection) -> None:
    trainer = new_trainer(shards, GENERATOR, TRAIN, 0, CPU)
    losses: list[float] = []
    step = trainer.train_step

    def spy(*arguments: object) -> Computed:
        result = step(*arguments)  # type: ignore[arg-type]
        losses.append(float(result.loss))
        return result

    trainer.train_step = spy  # type: ignore[method-assign, assignment]
    saved: list[int] = []
    logged = run(trainer, shards, lambda trainer, progress: saved.append(progress.step))
    assert saved == [4, 8, 11]
    assert [progress.step for progress in logged] == [3, 4, 6, 8, 9, 11]
    begin = 0
    for progress in logged:
        mean = sum(losses[begin : progress.step]) / (progress.step - begin)
        assert progress.loss == pytest.approx(mean, rel=1e-5)
        assert progress.steps == 11
        assert progress.tokens_per_second > 0
        assert 0 <= progress.waiting_share <= 1
        begin = progress.step
    assert run(trainer, shards, lambda *_: pytest.fail("nothing is left to do")) == []


def test_a_stopped_and_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, shards: ShardedCollection
) -> None:
    whole = new_trainer(shards, GENERATOR, TRAIN, 0, CPU)
    logged = run(whole, shards, lambda *_: None)

    class StoppedError(Exception):
        pass

    def save_then_stop(trainer: Trainer, progress: TrainingProgress) -> None:
        trainer.save(tmp_path)
        if progress.step == 8:
            raise StoppedError

    with pytest.raises(StoppedError):
        run(new_trainer(shards, GENERATOR, TRAIN, 0, CPU), shards, save_then_stop)
    resumed = new_trainer(shards, GENERATOR, TRAIN, 0, CPU)
    resumed.load(tmp_path)
    again = run(resumed, shards, lambda *_: None)
    assert [(p.step, p.loss, p.gradient_norm) for p in again] == [
        (p.step, p.loss, p.gradient_norm) for p in logged if p.step > 8
    ]
    for one, other in ((resumed.generator, whole.generator), (resumed.average, whole.average)):
        assert one.digest() == other.digest()


def test_the_loss_goes_down(shards: ShardedCollection) -> None:
    """Ten checkpoints with conditions of their own can be learned by heart."""
    config = replace(
        TRAIN, steps=600, tokens_per_checkpoint=10, checkpoints_per_step=10, learning_rate=3e-3, log_every=50
    )
    logged = run(new_trainer(shards, GENERATOR, config, 0, CPU), shards, lambda *_: None)
    losses = [progress.loss for progress in logged if progress.step % 50 == 0]
    assert losses[0] > 0.5
    assert losses[-1] < 0.5 * losses[0]


def test_condition_inputs(
    tmp_path: Path, shards: ShardedCollection, make_collection: Callable[..., ShardedCollection]
) -> None:
    assert shards.conditions is not None
    vector, none = ConditionConfig(kind=ConditionKind.vector), ConditionConfig(kind=ConditionKind.none)
    permutation = ConditionConfig(kind=ConditionKind.permutation)
    assert torch.equal(condition_inputs(shards, vector), shards.conditions)
    assert torch.equal(condition_inputs(shards, permutation), torch.arange(10))
    assert condition_inputs(shards, none).shape == (10, 0)
    bare = make_collection(tmp_path / "bare", condition_width=None)
    assert condition_inputs(bare, none).shape == (10, 0)
    stated = make_collection(tmp_path / "stated", states=3)
    assert stated.conditions is not None
    assert torch.equal(condition_inputs(stated, vector), stated.conditions)
    with_states = condition_inputs(stated, replace(vector, states=3))
    assert torch.equal(with_states[:, :3], stated.conditions)
    assert with_states[:, 3].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    # Seeds need not be consecutive.
    stated.states = torch.tensor([7, 42, 1000])[torch.arange(10) % 3]
    assert torch.equal(condition_inputs(stated, replace(vector, states=3)), with_states)


def test_what_checkpoints_of_a_state_share_is_learned(
    tmp_path: Path, make_collection: Callable[..., ShardedCollection]
) -> None:
    """Ten checkpoints, all conditions alike, a state each: only states tell the checkpoints apart."""
    directory = tmp_path / "shards"
    shards = make_collection(directory, states=10)
    shards.conditions = torch.zeros(10, 3)
    config = replace(
        TRAIN, steps=600, tokens_per_checkpoint=10, checkpoints_per_step=10, learning_rate=3e-3, log_every=50
    )
    losses = {}
    for states in (0, 10):
        condition = replace(GENERATOR.condition, states=states)
        trainer = new_trainer(shards, replace(GENERATOR, condition=condition), config, 0, CPU)
        losses[states] = run(trainer, shards, lambda *_: None)[-1].loss
    assert losses[10] < 0.7 * losses[0]
