"""All trials take the same compute, and the best config trains as its trial did."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ray_jobs.search.results import TrialResult, ranked
from ray_jobs.search.trial import Trial, best_config, make_trial
from rpg.collection.shards import ShardedCollection
from rpg.config import Config, load_config, save_config
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.training.flops import step_flops

ROUNDS = 9
POINTS = [
    {},
    {"shard.token_size": 8},
    {"shard.token_size": 40, "generator.denoiser.width": 96},
    {"generator.recurrent.width": 32, "generator.recurrent.depth": 2},
    {"train.checkpoints_per_step": 8, "train.tokens_per_checkpoint": 3},
]


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
    trial = make_trial("0", base, point, shards, ROUNDS)
    budget = 0.5 * 4000 * step_flops(base.generator, base.train, shards.layout, shards.conditions)
    layout = shards.layout.with_token_size(trial.config.shard.token_size)
    each = step_flops(trial.config.generator, trial.config.train, layout, shards.conditions)
    assert trial.step_flops == each
    steps = trial.config.train.steps
    assert budget - ROUNDS * each < steps * each <= budget
    assert steps == ROUNDS * trial.config.train.validate_every
    generator = Generator.for_collection(trial.config.generator, layout, shards.conditions, len(shards))
    assert trial.parameters == sum(parameter.numel() for parameter in generator.parameters())


def test_warm_up_averaging_and_tokens_scale_with_the_trial(base: Config, shards: ShardedCollection) -> None:
    same = make_trial("0", base, {}, shards, ROUNDS).config.train
    share = same.steps / base.train.steps
    assert share == pytest.approx(0.5, rel=0.01)
    assert same.warmup_steps == round(100 * share)
    # The average reaches back over the same share of the training.
    assert (1 - same.ema_decay) * share == pytest.approx(1 - base.train.ema_decay)
    smaller = make_trial("1", base, {"shard.token_size": 8}, shards, ROUNDS).config.train
    seen = base.train.tokens_per_checkpoint / shards.layout.tokens
    there = shards.layout.with_token_size(8).tokens
    assert smaller.tokens_per_checkpoint == pytest.approx(seen * there, abs=0.5)
    asked = {"train.tokens_per_checkpoint": 2, "train.warmup_steps": 7, "train.ema_decay": 0.5}
    own = make_trial("2", base, asked, shards, ROUNDS).config.train
    assert (own.tokens_per_checkpoint, own.warmup_steps, own.ema_decay) == (2, 7, 0.5)


def test_a_budget_below_a_step_a_round_is_refused(base: Config, shards: ShardedCollection) -> None:
    poor = replace(base, tune=replace(base.tune, compute=1e-4))
    with pytest.raises(RPGError, match=r"tune.compute: 0.0001 times .* expected more"):
        make_trial("0", poor, {}, shards, ROUNDS)


def test_the_best_config_reads_back_and_trains_as_its_trial(
    base: Config, shards: ShardedCollection, tmp_path: Path
) -> None:
    trial = make_trial("3", base, {"shard.token_size": 8, "train.learning_rate": 1e-3}, shards, ROUNDS)
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
    trial = make_trial("0", base, {}, shards, ROUNDS)

    def result(name: str, score: float | None, share: float) -> TrialResult:
        named = Trial(name, trial.point, trial.config, trial.step_flops, trial.parameters)
        return TrialResult(named, score, share, 1.0, None if score else "out of memory")

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
