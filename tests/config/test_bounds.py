"""Bounds and combinations: what a config may hold, and with which words it is refused."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Gt, Interval, Le, MultipleOf
from pydantic import TypeAdapter, ValidationError

from rpg.config import (
    ConditionKind,
    Config,
    Count,
    Expected,
    Finite,
    GeneratorConfig,
    Prediction,
    SamplingConfig,
    Seed,
    Solver,
    check_bounds,
    load_config,
    validate,
    validate_sampling,
)
from rpg.errors import RPGError


@pytest.mark.parametrize(
    "override",
    [
        "seed=-1",
        "shard.token_size=0",
        "shard.checkpoints_per_shard=0",
        "collect.epochs=0",
        "train.steps=0",
        "train.warmup_steps=-1",
        "train.learning_rate=0",
        "train.learning_rate=nan",
        "train.learning_rate=inf",
        "train.weight_decay=-0.1",
        "train.weight_decay=inf",
        "train.ema_decay=1",
        "train.ema_decay=nan",
        "evaluate.noise_levels=[0.1,0]",
        "evaluate.noise_levels=[nan]",
        "ray.num_cpus=0",
        "ray.gpus_per_worker=nan",
        "generator.recurrent.width=6",
        "generator.recurrent.depth=0",
        "generator.denoiser.kernel_size=4",
        "generator.denoiser.channels=[1,2,1]",
        "generator.denoiser.channels=[1,2,3,2,2]",
        "generator.denoiser.channels=[1,2,3,4,5,6,1]",
        "generator.denoiser.channels=[1,0,3,0,1]",
        "generator.condition.dropout=1",
        "generator.condition.states=-2",
        "generator.condition={kind: permutation, states: 3}",
        "generator.diffusion.timesteps=1",
        "generator.diffusion.beta_start=0",
        "generator.diffusion.beta_end=1",
        "generator.sampling.steps=0",
        "generator.sampling.steps=1001",
        "generator.sampling.eta=1.5",
        "generator.sampling.temperature=-1",
        "generator.sampling.temperature=inf",
        "generator.sampling.guidance=2",
    ],
)
def test_out_of_range(preset: Path, override: str, refusal: Callable[..., str]) -> None:
    key = override.partition("=")[0]
    assert key in refusal(preset, override).replace("beta_start, beta_end", "beta_start, " + key)


def test_head_size_divides_what_it_splits(preset: Path, refusal: Callable[..., str]) -> None:
    for kind, width in (("mamba2", "expand * width = 256"), ("transformer", "width = 256")):
        message = refusal(preset, f"generator.recurrent.kind={kind}", "generator.recurrent.head_size=48")
        assert width in message
    load_config(preset, ["generator.recurrent.kind=lstm", "generator.recurrent.head_size=48"])


def test_guidance_needs_dropped_conditions() -> None:
    generator = GeneratorConfig()
    generator.condition.dropout = 0.1
    validate_sampling(SamplingConfig(guidance=2.0), generator)
    generator.condition.dropout = 0.0
    with pytest.raises(RPGError, match="--guidance: needs a generator trained with condition"):
        validate_sampling(SamplingConfig(guidance=2.0), generator, prefix="--")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["generator.recurrent.kind=mamba2", "generator.recurrent.output_width=100"],
            "head_size: expected a divisor of expand * output_width",
        ),
        (
            ["generator.recurrent.kind=lstm", "generator.recurrent.output_width=512"],
            "output_width: expected 0 beside kind 'lstm'",
        ),
        (
            ["generator.condition.kind=none", "generator.condition.form=gated"],
            "condition.form: expected mlp beside kind 'none'",
        ),
        (
            ["generator.condition.form=convolutional", "generator.condition.dropout=0.1"],
            "condition.dropout: expected 0 beside form 'convolutional'",
        ),
        (
            ["generator.denoiser.kind=direct", "generator.diffusion.prediction=v"],
            "diffusion.prediction: expected x0 beside denoiser.kind direct",
        ),
        (
            ["generator.sampling.solver=ddim_leading", "generator.sampling.steps=1000"],
            "sampling.steps: expected less than diffusion.timesteps = 1000 with ddim_leading",
        ),
    ],
)
def test_settings_of_the_published_model_that_do_not_go_together(
    preset: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(RPGError, match=re.escape(message)):
        load_config(preset, overrides)


def test_the_defaults_are_valid() -> None:
    validate(Config())


def test_the_published_model_can_be_described(preset: Path) -> None:
    """Its settings, as the preset `paper` has them."""
    config = load_config(
        preset,
        [
            "generator.recurrent.kind=mamba2",
            "generator.denoiser.kind=unet",
            "generator.condition.kind=permutation",
            "generator.diffusion.prediction=noise",
            "generator.sampling.solver=ddim_leading",
            "generator.sampling.steps=60",
            "shard.token_size=8192",
            "shard.normalisation=zscore",
        ],
    )
    assert config.generator.condition.kind is ConditionKind.permutation
    assert config.generator.diffusion.prediction is Prediction.noise
    assert config.generator.sampling.solver is Solver.ddim_leading


def test_no_two_sections_share_their_lists() -> None:
    one: Any = Config()
    one.generator.denoiser.channels.append(5)
    assert Config().generator.denoiser.channels[-1] == 1


@dataclasses.dataclass
class Item:
    size: Annotated[int, Ge(1), MultipleOf(4)] = 4


@dataclasses.dataclass
class Section:
    count: Count = 1
    size: Annotated[int, Ge(1), Le(9)] = 1
    share: Annotated[Finite, Interval(ge=0, lt=1)] = 0.0
    eta: Annotated[Finite, Interval(ge=0, le=1)] = 0.0
    rate: Annotated[Finite, Gt(0)] = 1.0
    any_number: Finite = 0.0
    days: Annotated[float, Ge(0)] = 0.0
    optional: Annotated[int, Ge(1)] | None = None
    seed: Seed = 0
    replicas: Annotated[int, Ge(1), Expected("at least 1")] = 1
    levels: Annotated[list[Annotated[Finite, Gt(0)]], Expected("positive values")] = dataclasses.field(
        default_factory=lambda: [1.0]
    )
    items: list[Item] = dataclasses.field(default_factory=lambda: [Item()])
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    name: str = ""
    on: bool = False


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "a.count: expected a finite value of at least 1, got 0"),
        ({"size": 0}, "a.size: expected a finite value of at least 1, got 0"),
        ({"size": 10}, "a.size: expected at most 9, got 10"),
        ({"share": 1.0}, "a.share: expected 0 <= value < 1, got 1.0"),
        ({"share": float("nan")}, "a.share: expected 0 <= value < 1, got nan"),
        ({"eta": 1.5}, "a.eta: expected 0 <= value <= 1, got 1.5"),
        ({"rate": 0.0}, "a.rate: expected a finite value above 0, got 0.0"),
        ({"rate": INFINITE}, "a.rate: expected a finite value above 0, got inf"),
        ({"any_number": -INFINITE}, "a.any_number: expected a finite value, got -inf"),
        ({"days": -1.0}, "a.days: expected at least 0, got -1.0"),
        ({"optional": 0}, "a.optional: expected a finite value of at least 1, got 0"),
        ({"seed": 2**64}, f"a.seed: expected 0 <= seed < 2**64, got {2**64}"),
        ({"replicas": 0}, "a.replicas: expected at least 1, got 0"),
        ({"levels": [1.0, 0.0]}, "a.levels: expected positive values, got [1.0, 0.0]"),
        ({"items": [Item(), Item(6)]}, "a.items[1].size: expected a multiple of 4, got 6"),
        (
            {"sampling": SamplingConfig(token_batch=2**21)},
            "a.sampling.token_batch: expected at most 1048576, got 2097152",
        ),
    ],
)
def test_messages_name_the_key_and_the_bound(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RPGError) as caught:
        check_bounds(Section(**changes), "a.")
    assert str(caught.value) == message


def test_what_has_no_bound_is_let_through() -> None:
    check_bounds(Section(days=INFINITE, optional=7, seed=2**64 - 1, items=[], levels=[], name="x", on=True))


@pytest.mark.parametrize("schema", [Section, SamplingConfig, Config])
def test_pydantic_draws_the_same_bounds(schema: type) -> None:
    """A request or a file is refused exactly where a config is."""
    adapter, checked = TypeAdapter(schema), 0
    for each in dataclasses.fields(schema):
        tried: list[float] = []
        if type(each.default) is float:
            tried = [-1.0, 0.0, 0.5, 1.0, 1.5, INFINITE, -INFINITE, float("nan")]
        elif type(each.default) is int:
            tried = [-1, 0, 1, 4, 9, 10, 2**20, 2**21, 2**64 - 1, 2**64]
        for value in tried:
            checked += 1
            try:
                adapter.validate_python({each.name: value})
                is_accepted = True
            except ValidationError:
                is_accepted = False
            if is_accepted:
                check_bounds(schema(**{each.name: value}))
            else:
                with pytest.raises(RPGError, match=f"^{each.name}: expected "):
                    check_bounds(schema(**{each.name: value}))
    assert checked
