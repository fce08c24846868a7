"""Points that a search draws from `tune.space`, and spaces that are refused."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from ray_jobs.search.space import draw_points, search_space
from rpg.config import Config, load_config, validate, with_values
from rpg.errors import RPGError


def config(space: Any, seed: int = 0) -> Config:
    result = Config(seed=seed)
    result.tune.space = space
    return result


def points(space: Any, number: int, seed: int = 0) -> list[dict[str, Any]]:
    searched = config(space, seed)
    return draw_points(searched, search_space(searched), number)


MIXED = {
    "shard.token_size": [128, 256, 512],
    "generator.denoiser.width": {"min": 128, "max": 1024, "log": True},
    "train.learning_rate": {"min": 1e-3, "max": 4e-3},
}


def test_points_are_different_valid_and_determined_by_the_seed() -> None:
    drawn = points(MIXED, 40)
    assert len(drawn) == 40
    assert drawn[0] == {}
    assert len({tuple(point.items()) for point in drawn}) == 40
    for point in drawn[1:]:
        validate(with_values(Config(), point, "test"))
        assert point["shard.token_size"] in (128, 256, 512)
        assert type(point["generator.denoiser.width"]) is int
        assert 128 <= point["generator.denoiser.width"] <= 1024
        assert 1e-3 <= point["train.learning_rate"] <= 4e-3
    assert points(MIXED, 40) == drawn
    # A longer search begins as the shorter one did.
    assert points(MIXED, 10) == drawn[:10]
    assert points(MIXED, 40, seed=1) != drawn


def test_a_logarithmic_range_is_even_on_a_logarithmic_scale() -> None:
    space = {"generator.denoiser.width": {"min": 100, "max": 10_000, "log": True}}
    drawn = [point["generator.denoiser.width"] for point in points(space, 600)[1:]]
    below = sum(width < math.sqrt(100 * 10_000) for width in drawn)
    # Four standard deviations of a binomial.
    assert abs(below - len(drawn) / 2) < 4 * math.sqrt(len(drawn)) / 2


def test_every_point_of_a_small_space_is_drawn_once() -> None:
    space = {"generator.denoiser.width": [256, 512], "generator.denoiser.depth": [2, 3]}
    drawn = points(space, 100)
    # The config itself is one of them: width 512, depth 3.
    assert Counter(tuple(point.values()) for point in drawn[1:]) == Counter([(256, 2), (256, 3), (512, 2)])


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "tune.space: expected keys of the config"),
        ({"train.steps": [1]}, "train.steps: cannot be searched: it is the same for all trials"),
        (
            {"collect.epochs": [1]},
            "collect.epochs: cannot be searched, since all trials share one collection",
        ),
        ({"train.learning_rat": [1e-3]}, "train.learning_rate"),
        ({"train.learning_rate": []}, "train.learning_rate: expected at least one value to try"),
        ({"train.learning_rate": 1e-3}, "expected a list of values or a range"),
        ({"train.learning_rate": ["fast"]}, "train.learning_rate: .*fast"),
        ({"train.learning_rate": {"min": 2e-3, "max": 2e-3}}, "empty range: expected min < max"),
        ({"train.learning_rate": {"min": 3e-3, "max": 1e-3}}, "empty range: expected min < max"),
        ({"train.learning_rate": {"min": 0, "max": 1e-3, "log": True}}, "expected min > 0"),
        ({"train.learning_rate": {"min": 1e-3}}, "expected both min and max"),
        ({"train.learning_rate": {"min": 1e-3, "max": math.inf}}, "expected finite numbers"),
        ({"train.learning_rate": {"min": "a", "max": 1}}, "expected finite numbers"),
        ({"train.learning_rate": {"min": 1e-3, "max": 1, "step": 2}}, "unknown key 'step'"),
        ({"train.learning_rate": {"min": 1e-3, "max": 1, "log": "yes"}}, "log: expected true or false"),
        ({"generator.denoiser.depth": [0]}, "generator.denoiser.depth: 0 is never valid"),
    ],
)
def test_invalid_spaces_are_refused_in_one_line(space: Any, message: str) -> None:
    with pytest.raises(RPGError, match=message) as caught:
        search_space(config(space))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("tune.space")


def test_the_preset_can_be_searched() -> None:
    preset = load_config(Path(__file__).parents[3] / "configs" / "digits.yaml")
    drawn = draw_points(preset, search_space(preset), preset.tune.trials)
    assert len(drawn) >= 12


def test_choices_may_be_lists() -> None:
    config = Config()
    config.generator.denoiser.channels = [1, 16, 32, 16, 1]
    config.tune.space = {"generator.denoiser.channels": [[1, 16, 32, 16, 1], [1, 32, 64, 32, 1]]}
    points = draw_points(config, search_space(config), 4)
    assert points == [{}, {"generator.denoiser.channels": [1, 32, 64, 32, 1]}]
