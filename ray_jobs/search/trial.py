"""One trial of a search: a config of its own, at the same compute as all others."""

import dataclasses
from dataclasses import dataclass

from ray_jobs.search.space import Point
from rpg.collection.retokenised import Retokenised
from rpg.collection.shards import ShardedCollection
from rpg.config import Config, TrackingConfig, with_values
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.training.flops import step_flops


@dataclass(frozen=True)
class Trial:
    """The config that one trial trains, and its cost."""

    name: str
    point: Point
    config: Config
    step_flops: int
    parameters: int


def make_trial(name: str, base: Config, point: Point, shards: ShardedCollection, rounds: int) -> Trial:
    """The trial of `point`, with as many steps as take `tune.compute` times the base's arithmetic.

    Where the point does not say otherwise, the trial sees the same share of every checkpoint in a step as the
    base, warms up for the same share of its steps, and averages its weights over the same share of them.

    Args:
        name: of the trial.
        base: the config that the search starts from.
        point: values by dotted key.
        shards: the training set, at the base's token size.
        rounds: equal parts of the budget, after each of which the trial is validated.

    Raises:
        RPGError: if the budget is too small for a step a round.
    """
    config = with_values(base, point, "tune.space")
    if "train.tokens_per_checkpoint" not in point:
        seen = min(base.train.tokens_per_checkpoint, shards.layout.tokens) / shards.layout.tokens
        tokens = shards.layout.with_token_size(config.shard.token_size).tokens
        config.train.tokens_per_checkpoint = max(1, round(seen * tokens))
    flops, parameters = _size(config, shards)
    budget = base.tune.compute * _size(base, shards)[0] * base.train.steps
    every = int(budget / flops / rounds)
    if every < 1:
        raise RPGError(
            f"tune.compute: {base.tune.compute:g} times the compute of the config is less than "
            f"{rounds} training steps of {point}; expected more"
        )
    steps = every * rounds
    share = steps / base.train.steps
    changed: dict[str, float] = {"steps": steps, "validate_every": every, "save_every": every, "keep": 1}
    if "train.warmup_steps" not in point:
        changed["warmup_steps"] = round(base.train.warmup_steps * share)
    if "train.ema_decay" not in point:
        changed["ema_decay"] = max(0.0, 1 - (1 - base.train.ema_decay) / share)
    train = dataclasses.replace(config.train, **changed)  # type: ignore[arg-type]
    quiet = TrackingConfig(tensorboard=False)
    return Trial(name, point, dataclasses.replace(config, train=train, tracking=quiet), flops, parameters)


def best_config(trial: Trial, base: Config) -> Config:
    """A config that trains as the trial did, in an output directory of its own."""
    config = with_values(trial.config, {}, "tune")
    config.name = f"{base.name}-tuned"
    config.output = f"{base.output.rstrip('/')}-tuned"
    config.collect.directory = base.collect.directory or f"{base.output.rstrip('/')}/collection"
    for key in ("validate_every", "save_every", "keep"):
        setattr(config.train, key, getattr(base.train, key))
    config.tune, config.tracking, config.ray = (
        dataclasses.replace(base.tune, space={}),
        base.tracking,
        base.ray,
    )
    return config


def _size(config: Config, shards: ShardedCollection) -> tuple[int, int]:
    """Floating-point operations of a training step, and parameters of the generator."""
    seen = Retokenised(shards, config.shard.token_size)
    generator = Generator.for_collection(
        config.generator, seen.layout, shards.conditions, len(shards), states=shards.states
    )
    parameters = sum(parameter.numel() for parameter in generator.parameters())
    return step_flops(config.generator, config.train, seen.layout, shards.conditions), parameters
