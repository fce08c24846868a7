"""All trials take the same compute, and the best config trains as its trial did."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ray_jobs.search.results import TrialResult, ranked
from ray_jobs.search.trial import TrialMaker, best_config
from rpg.collection.shards import ShardedCollection
from rpg.config import Config, load_config, save_config
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.tasks.families import Asked
from rpg.tasks.task_loss import TaskLoss, TrainingTasks
from rpg.training.flops import step_flops
from tests.conftest import SmallNet

ROUNDS = 9
POINTS = [
    {},
    {"shard.token_size": 8},
    {"shard.token_size": 40, "generator.denoiser.width": 96},
    {"generator.recurrent.width": 32, "generator.recurrent.depth": 2},
    {"train.checkpoints_per_step": 8, "train.tokens_per_checkpoint": 3},
]


class Sums:
    """Networks of the collection, whose outputs are to be the sums of their images."""

    def build_network(self) -> nn.Module:
        return SmallNet()

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor]:
        return (torch.randn(size, 1, 4, 4, generator=random),)

    def loss(self, outputs: Tensor, batch: tuple[Tensor], condition: Asked) -> Tensor:
        return F.mse_loss(outputs.sum(1), batch[0].sum((1, 2, 3)))


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, make_collection: Callable[..., ShardedCollection]
) -> ShardedCollection:
    return make_collection(tmp_path_factory.mktemp("trial") / "shards")


@pytest.fixture
def base(tmp_path: Path) -> Config:
    (tmp_path / "config.yaml").write_text(
        """
        name: small
        output: runs/small
        shard: {token_size: 16}
        generator:
          recurrent: {width: 16, head_size: 8, state_size: 8}
          denoiser: {width: 64, depth: 2}
          condition: {width: 8}
        train: {steps: 4000, checkpoints_per_step: 4, tokens_per_checkpoint: 6, warmup_steps: 100}
        tune: {compute: 0.5, space: {generator.denoiser.depth: [1, 2]}}
        """
    )
    return load_config(tmp_path / "config.yaml")


@pytest.mark.parametrize("point", POINTS)
def test_every_trial_takes_the_same_compute(base: Config, shards: ShardedCollection, point: dict) -> None:
    trial = TrialMaker(base, shards, ROUNDS).make("0", point)
    budget = 0.5 * 4000 * step_flops(base.generator, base.train, shards.layout, shards.conditions)
    layout = shards.layout.with_token_size(trial.config.shard.token_size)
    each = step_flops(trial.config.generator, trial.config.train, layout, shards.conditions)
    assert trial.step_flops == each
    steps = trial.config.train.steps
    assert budget - ROUNDS * each < steps * each <= budget
    assert steps == ROUNDS * trial.config.train.validate_every
    generator = Generator.for_collection(trial.config.generator, layout, shards.conditions, len(shards))
    assert trial.parameters == sum(parameter.numel() for parameter in generator.parameters())


@pytest.mark.parametrize("point", [*POINTS, {"refine.tasks_per_step": 2}])
def test_refining_takes_the_same_compute_in_every_trial(
    base: Config, shards: ShardedCollection, point: dict
) -> None:
    base.refine.steps, base.refine.tasks_per_step, base.refine.samples_per_step = 150, 8, 8
    assert shards.conditions is not None
    tasks, loss = (
        TrainingTasks(shards.conditions, shards.conditions.tolist()),
        TaskLoss(Sums(), "sums", torch.device("cpu")),
    )
    maker = TrialMaker(base, shards, ROUNDS, (tasks, loss))
    same, trial = maker.make("0", {}), maker.make("1", point)
    assert same.fitting_rounds == trial.fitting_rounds
    fitting, refining = same.fitting_rounds, ROUNDS - same.fitting_rounds
    compute = [base.train.steps * same.step_flops, base.refine.steps * same.refining_step_flops]
    assert fitting == pytest.approx(ROUNDS * compute[0] / sum(compute), abs=0.5)
    for settings, flops, spent, rounds in (
        (trial.config.train, trial.step_flops, compute[0], fitting),
        (trial.config.refine, trial.refining_step_flops, compute[1], refining),
    ):
        assert 0.5 * spent - rounds * flops < settings.steps * flops <= 0.5 * spent
        assert settings.steps == rounds * settings.validate_every
    refine = same.config.refine
    assert refine.warmup_steps == round(base.refine.warmup_steps * refine.steps / base.refine.steps)


def test_warm_up_averaging_and_tokens_scale_with_the_trial(base: Config, shards: ShardedCollection) -> None:
    maker = TrialMaker(base, shards, ROUNDS)
    same = maker.make("0", {}).config.train
    share = same.steps / base.train.steps
    assert share == pytest.approx(0.5, rel=0.01)
    assert same.warmup_steps == round(100 * share)
    # The average reaches back over the same share of the training.
    assert (1 - same.ema_decay) * share == pytest.approx(1 - base.train.ema_decay)
    smaller = maker.make("1", {"shard.token_size": 8}).config.train
    seen = base.train.tokens_per_checkpoint / shards.layout.tokens
    there = shards.layout.with_token_size(8).tokens
    assert smaller.tokens_per_checkpoint == pytest.approx(seen * there, abs=0.5)
    asked = {"train.tokens_per_checkpoint": 2, "train.warmup_steps": 7, "train.ema_decay": 0.5}
    own = maker.make("2", asked).config.train
    assert (own.tokens_per_checkpoint, own.warmup_steps, own.ema_decay) == (2, 7, 0.5)


def test_a_budget_below_a_step_a_round_is_refused(base: Config, shards: ShardedCollection) -> None:
    poor = replace(base, tune=replace(base.tune, compute=1e-4))
    with pytest.raises(RPGError, match=r"tune.compute: 0.0001 times .* expected more"):
        TrialMaker(poor, shards, ROUNDS).make("0", {})


def test_the_best_config_reads_back_and_trains_as_its_trial(
    base: Config, shards: ShardedCollection, tmp_path: Path
) -> None:
    trial = TrialMaker(base, shards, ROUNDS).make("3", {"shard.token_size": 8, "train.learning_rate": 1e-3})
    save_config(best_config(trial, base), tmp_path / "best.yaml")
    best = load_config(tmp_path / "best.yaml")
    assert best.generator == trial.config.generator
    assert best.shard.token_size == 8
    often = ("validate_every", "save_every", "keep")
    assert (
        replace(best.train, **{key: getattr(trial.config.train, key) for key in often}) == trial.config.train
    )
    assert {key: getattr(best.train, key) for key in often} == {
        key: getattr(base.train, key) for key in often
    }
    assert (best.name, best.output) == ("small-tuned", "runs/small-tuned")
    assert best.collect.directory == "runs/small/collection"
    assert best.tune.space == {}


def test_trials_are_ranked_by_budget_and_then_score(base: Config, shards: ShardedCollection) -> None:
    trial = TrialMaker(base, shards, ROUNDS).make("0", {})

    def result(name: str, score: float | None, share: float) -> TrialResult:
        return TrialResult(replace(trial, name=name), score, share, 1.0, None if score else "out of memory")

    results = [
        result("failed", None, 1.0),
        result("early", 0.99, 1 / 9),
        result("second", 0.90, 1.0),
        result("third", 0.97, 1 / 3),
        result("best", 0.95, 1.0),
    ]
    assert [each.trial.name for each in ranked(results)] == ["best", "second", "third", "early", "failed"]
    lowest_first = ["second", "best", "third", "early", "failed"]
    assert [each.trial.name for each in ranked(results, higher_is_better=False)] == lowest_first
