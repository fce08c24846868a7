"""One trial of a search: a config of its own, at the same compute as all others."""

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from ray_jobs.search.space import Point
from rpg.collection.retokenised import Retokenised
from rpg.collection.shards import ShardedCollection
from rpg.config import Config, OptimiserConfig, TrackingConfig, with_values
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.tasks.task_loss import TaskLoss, TrainingTasks
from rpg.training.flops import refining_step_flops, step_flops

_Settings = TypeVar("_Settings", bound=OptimiserConfig)


@dataclass(frozen=True)
class Trial:
    """The config that one trial trains, and its cost.

    Attributes:
        name: of the trial.
        point: values by dotted key.
        config: of the trial.
        fitting_rounds: rounds of its budget that are spent on fitting; the rest is spent on refining.
        step_flops: floating-point operations of a step of fitting.
        refining_step_flops: the same of refining; 0 without.
        parameters: of the generator.
    """

    name: str
    point: Point
    config: Config
    fitting_rounds: int
    step_flops: int
    refining_step_flops: int
    parameters: int


class TrialMaker:
    """Makes trials that all take the same compute.

    Fitting takes as much in every trial, and so does refining. Each is cut into rounds of about equal
    compute, so that all trials are in the same part of their training after the same round.
    """

    def __init__(
        self,
        base: Config,
        shards: ShardedCollection,
        rounds: int,
        refining: tuple[TrainingTasks, TaskLoss] | None = None,
    ) -> None:
        """Start from `base`.

        Args:
            base: the config that the search starts from.
            shards: the training set, at the base's token size.
            rounds: parts of a trial's budget, after each of which it is validated; at least 2.
            refining: by what generators are refined, on the CPU; None: they are only fitted.
        """
        self._base = base
        self._shards = shards
        self._rounds = rounds
        self._refining = refining
        fitting, refined, _ = self._cost(base)
        self._fitting = base.tune.compute * fitting * base.train.steps
        self._refined = base.tune.compute * refined * base.refine.steps
        self._fitting_rounds = rounds
        if self._refined:
            share = self._fitting / (self._fitting + self._refined)
            self._fitting_rounds = min(max(1, round(rounds * share)), rounds - 1)

    def make(self, name: str, point: Point) -> Trial:
        """The trial of `point`, with as many steps as take `tune.compute` times the base's arithmetic.

        Where the point does not say otherwise, the trial sees the same share of every checkpoint in a step as
        the base, warms up for the same share of its steps, and averages its weights over the same share of
        them.

        Args:
            name: of the trial.
            point: values by dotted key.

        Raises:
            RPGError: if the budget is too small for a step a round.
        """
        base = self._base
        config = with_values(base, point, "tune.space")
        if "train.tokens_per_checkpoint" not in point:
            layout = self._shards.layout
            seen = min(base.train.tokens_per_checkpoint, layout.tokens) / layout.tokens
            tokens = layout.with_token_size(config.shard.token_size).tokens
            config.train.tokens_per_checkpoint = max(1, round(seen * tokens))
        fitting, refining, parameters = self._cost(config)
        config.train = self._in_rounds("train", config.train, base.train, point, self._fitting / fitting)
        if refining:
            affordable = self._refined / refining
            config.refine = self._in_rounds("refine", config.refine, base.refine, point, affordable)
        config.tracking = TrackingConfig(tensorboard=False)
        return Trial(name, point, config, self._fitting_rounds, fitting, refining, parameters)

    def _in_rounds(
        self, section: str, settings: _Settings, base: _Settings, point: Point, affordable: float
    ) -> _Settings:
        """Settings of a section with at most `affordable` steps, cut into the section's rounds."""
        fitting = self._fitting_rounds
        rounds = fitting if section == "train" else self._rounds - fitting
        every = int(affordable / rounds)
        if every < 1:
            raise RPGError(
                f"tune.compute: {self._base.tune.compute:g} times the compute of the config is less than "
                f"{rounds} steps of {section} with {point}; expected more"
            )
        steps = every * rounds
        share = steps / base.steps
        changed: dict[str, float] = {"steps": steps, "validate_every": every, "save_every": every, "keep": 1}
        if f"{section}.warmup_steps" not in point:
            changed["warmup_steps"] = round(base.warmup_steps * share)
        if f"{section}.ema_decay" not in point:
            changed["ema_decay"] = max(0.0, 1 - (1 - base.ema_decay) / share)
        return dataclasses.replace(settings, **changed)  # type: ignore[arg-type]

    def _cost(self, config: Config) -> tuple[int, int, int]:
        """Floating-point operations of a step of fitting and of one of refining, and parameters."""
        seen = Retokenised(self._shards, config.shard.token_size)
        generator = Generator.for_collection(
            config.generator,
            seen.layout,
            self._shards.conditions,
            len(self._shards),
            states=self._shards.states,
        )
        parameters = sum(parameter.numel() for parameter in generator.parameters())
        fitting = step_flops(config.generator, config.train, seen.layout, self._shards.conditions)
        refining = refining_step_flops(generator, config.refine, *self._refining) if self._refining else 0
        return fitting, refining, parameters


def best_config(trial: Trial, base: Config) -> Config:
    """A config that trains as the trial did, in an output directory of its own."""
    config = with_values(trial.config, {}, "tune")
    config.name = f"{base.name}-tuned"
    config.output = f"{base.output.rstrip('/')}-tuned"
    config.collect.directory = base.collect.directory or f"{base.output.rstrip('/')}/collection"
    for section in ("train", "refine"):
        for key in ("validate_every", "save_every", "keep"):
            setattr(getattr(config, section), key, getattr(getattr(base, section), key))
    config.tune, config.tracking, config.ray = (
        dataclasses.replace(base.tune, space={}),
        base.tracking,
        base.ray,
    )
    return config
