"""The settings that a search tries: `tune.space` of a config, and points drawn from it."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from rpg.config import Config, check_key, validate, with_values
from rpg.errors import RPGError

Point = dict[str, Any]
"""Values by dotted key."""

_SECTIONS = ("generator.", "train.", "refine.", "shard.token_size")
_SET_BY_THE_SEARCH = (
    *(
        f"{section}.{name}"
        for section in ("train", "refine")
        for name in ("steps", "validate_every", "validation_models", "save_every", "keep", "log_every")
    ),
    "train.sharding", "generator.condition.kind", "generator.condition.size",
)  # fmt: skip
_LARGEST_GRID = 10_000
_DRAWS_PER_POINT = 200


@dataclass(frozen=True)
class Choice:
    """One of a list of values."""

    values: list[Any]

    def draw(self, source: random.Random) -> Any:
        """One of the values."""
        return source.choice(self.values)


@dataclass(frozen=True)
class Range:
    """A number from an interval, its ends included; evenly spread, or evenly on a logarithmic scale."""

    minimum: float
    maximum: float
    log: bool
    integer: bool

    def draw(self, source: random.Random) -> float:
        """A number from the interval."""
        if self.log:
            value = math.exp(source.uniform(math.log(self.minimum), math.log(self.maximum)))
        else:
            value = source.uniform(self.minimum, self.maximum)
        value = min(max(value, self.minimum), self.maximum)
        return round(value) if self.integer else value


def search_space(config: Config) -> dict[str, Choice | Range]:
    """The dimensions of the search space by their keys, as `tune.space` declares them.

    Raises:
        RPGError: naming the key, if it is unknown or cannot be searched, or if its values are missing, of the
            wrong type, or never valid.
    """
    if not config.tune.space:
        raise RPGError("tune.space: expected keys of the config and what to try, found nothing")
    space = {key: _dimension(config, key, tried) for key, tried in config.tune.space.items()}
    for key, dimension in space.items():
        ends = [dimension.minimum, dimension.maximum] if isinstance(dimension, Range) else dimension.values
        for value in ends:
            _check_usable(config, space, key, value)
    return space


def draw_points(config: Config, space: dict[str, Choice | Range], number: int) -> list[Point]:
    """At most `number` different valid points, determined by `config.seed`; the first is the config itself.

    Of a small space of choices all points are taken, so there may be fewer.
    """
    source = random.Random(config.seed)
    points: list[Point] = [{}]
    # Points are compared as text, because a value may be a list, which no set can hold.
    seen = {repr([attrgetter(key)(config) for key in space])}
    for point in _candidates(space, source, number):
        values = repr(list(point.values()))
        if len(points) == number:
            break
        if values not in seen and _why_invalid(config, point) is None:
            points.append(point)
        seen.add(values)
    return points


def _candidates(space: dict[str, Choice | Range], source: random.Random, number: int) -> Iterator[Point]:
    choices = [dimension.values for dimension in space.values() if isinstance(dimension, Choice)]
    if len(choices) == len(space) and math.prod(map(len, choices)) <= _LARGEST_GRID:
        grid = list(itertools.product(*choices))
        source.shuffle(grid)
        for values in grid:
            yield dict(zip(space, values, strict=True))
        return
    for _ in range(number * _DRAWS_PER_POINT):
        yield _draw(space, source)


def _draw(space: dict[str, Choice | Range], source: random.Random) -> Point:
    return {key: dimension.draw(source) for key, dimension in space.items()}


def _dimension(config: Config, key: str, tried: Any) -> Choice | Range:
    where = f"tune.space: {key}"
    check_key(key, "tune.space")
    if not key.startswith(_SECTIONS):
        raise RPGError(
            f"{where}: cannot be searched, since all trials share one collection and its shards; "
            "expected shard.token_size or a key of generator, train or refine"
        )
    if key in _SET_BY_THE_SEARCH:
        raise RPGError(
            f"{where}: cannot be searched: it is the same for all trials, or follows from tune.compute"
        )
    if key.startswith("refine.") and not config.refine.steps:
        raise RPGError(f"{where}: cannot be searched without refining: refine.steps is 0")
    if isinstance(tried, list):
        if not tried:
            raise RPGError(f"{where}: expected at least one value to try, got an empty list")
        for value in tried:
            with_values(config, {key: value}, "tune.space")
        return Choice(tried)
    if not isinstance(tried, dict):
        raise RPGError(
            f"{where}: expected a list of values or a range {{min, max, log, integer}}, got {tried!r}"
        )
    return _range(config, key, tried, where)


def _range(config: Config, key: str, given: dict[str, Any], where: str) -> Range:
    if unknown := sorted(set(given) - {"min", "max", "log", "integer"}):
        raise RPGError(f"{where}: unknown key '{unknown[0]}' in a range; expected min, max, log, integer")
    if not {"min", "max"} <= set(given):
        raise RPGError(f"{where}: expected both min and max of the range")
    minimum, maximum = given["min"], given["max"]
    log, integer = given.get("log", False), given.get("integer", type(attrgetter(key)(config)) is int)
    for name, flag in (("log", log), ("integer", integer)):
        if not isinstance(flag, bool):
            raise RPGError(f"{where}: {name}: expected true or false, got {flag!r}")
    for end in (minimum, maximum):
        if isinstance(end, bool) or not isinstance(end, int | float) or not math.isfinite(end):
            raise RPGError(f"{where}: expected finite numbers for min and max, got {end!r}")
    if not minimum < maximum:
        raise RPGError(f"{where}: empty range: expected min < max, got {minimum} and {maximum}")
    if log and minimum <= 0:
        raise RPGError(f"{where}: expected min > 0 on a logarithmic scale, got {minimum}")
    return Range(minimum, maximum, log, integer)


def _check_usable(config: Config, space: dict[str, Choice | Range], key: str, value: Any) -> None:
    """Refuse a value that is not valid in any combination with values of the other keys."""
    source, reason = random.Random(0), _why_invalid(config, {key: value})
    for _ in range(_DRAWS_PER_POINT):
        if reason is None:
            return
        reason = _why_invalid(config, {**_draw(space, source), key: value})
    raise RPGError(f"tune.space: {key}: {value!r} is never valid: {reason}")


def _why_invalid(config: Config, point: Point) -> str | None:
    try:
        validate(with_values(config, point, "tune.space"))
    except RPGError as error:
        return str(error)
    return None
