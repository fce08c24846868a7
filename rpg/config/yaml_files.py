"""Configs as YAML files: reading with `key=value` overrides, refusing unknown keys, saving."""

import difflib
import io
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rpg.config.generator import GeneratorConfig, validate_generator
from rpg.config.run import Config, validate
from rpg.errors import RPGError, one_line
from rpg.storage.below import read_below, read_regular
from rpg.storage.files import write_text
from rpg.storage.locations import AnyPath

T = TypeVar("T")

_MOST_BYTES = 2**20
_MOST_NESTED = 64
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_RENAMED = {"collect.family": "tasks"}
"""Keys that earlier versions had."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML preset, apply `key=value` overrides (dotted keys) and validate.

    Raises:
        RPGError: for a missing or malformed file, an unknown key (the nearest valid one is named), a value
            of the wrong type, or a value out of range.
    """
    merged: Any = _read_yaml(path, Config, "a YAML config")
    for override in overrides:
        key, separator, given = override.partition("=")
        if not separator:
            raise RPGError(f"override '{override}': expected key=value")
        check_key(key, "override")
        try:
            _check_nesting(given)
            # Replaced, not merged: a mapping such as tune.space is one value.
            value = OmegaConf.select(OmegaConf.from_dotlist([override]), key)
            OmegaConf.update(merged, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise RPGError(f"override '{override}': {one_line(error)}") from error
        except Exception as error:
            raise RPGError(f"override '{override}': not a valid value: {one_line(error)}") from error
    config = _to_object(merged, path)
    assert isinstance(config, Config)
    validate(config)
    return config


def with_values(config: Config, values: Mapping[str, Any], source: str) -> Config:
    """A copy of `config` with other values at dotted keys, not validated; `source` is named in messages.

    Raises:
        RPGError: for an unknown key or a value of the wrong type.
    """
    changed = OmegaConf.structured(config)
    for key, value in values.items():
        check_key(key, source)
        try:
            OmegaConf.update(changed, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise RPGError(f"{source}: {key}: {one_line(error)}") from error
    result = OmegaConf.to_object(changed)
    assert isinstance(result, Config)
    return result


def generator_config_from_yaml(path: Path) -> GeneratorConfig:
    """Read a saved generator's `config.yaml`, which somebody else may have written.

    It is no link, and its values stand for themselves: nothing in it asks for a variable of the environment.

    Raises:
        RPGError: for a missing or malformed file, an unknown key, a value of the wrong type or out of range.
    """
    config = read_config(path, GeneratorConfig, "a generator's configuration", is_foreign=True)
    validate_generator(config, prefix=f"{path}: ")
    return config


def read_config(path: Path, schema: type[T], what: str, is_foreign: bool = False) -> T:
    """Read a YAML file over the defaults of a dataclass `schema`.

    Args:
        path: of the file.
        schema: a dataclass.
        what: names the file's role in messages.
        is_foreign: whether somebody else may have written the file: a link, and values that stand for
            others (`${...}`), are refused then.

    Raises:
        RPGError: for a missing or malformed file, an unknown key (the nearest valid one is named), or a
            value of the wrong type.
    """
    config = _to_object(_read_yaml(path, schema, what, is_foreign), path)
    assert isinstance(config, schema)
    return config


def save_config(config: Any, path: AnyPath) -> None:
    """Write a dataclass of this package as YAML that reads back to an equal object."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def to_plain(config: Any) -> Any:
    """A config as plain dictionaries, lists and scalars, for JSON and hashing."""
    return OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)


def check_key(dotted: str, source: str) -> None:
    """Check that there is a value, not a section, at a dotted key; `source` is named in messages.

    Raises:
        RPGError: naming the key, and the nearest valid one.
    """
    schema: Any = Config
    prefix = ""
    for part in dotted.split("."):
        names = {f.name: f.type for f in fields(schema)} if is_dataclass(schema) else {}
        if part not in names:
            raise RPGError(f"{source}: unknown key '{dotted}'{_nearest(part, list(names), prefix)}")
        schema = names[part]
        prefix += f"{part}."
    if is_dataclass(schema):
        raise RPGError(
            f"{source}: '{dotted}' is a section; expected one of its keys, such as "
            f"'{dotted}.{fields(schema)[0].name}'"
        )


def _read_yaml(path: Path, schema: type, what: str, is_foreign: bool = False) -> DictConfig:
    """The schema's defaults with a file's values; `what` names the file's role in error messages."""
    try:
        if is_foreign:
            content = read_below(path.parent, path.name, _MOST_BYTES)
        else:
            content = read_regular(path, _MOST_BYTES)
        text = content.decode()
        _check_nesting(text)
        given = OmegaConf.load(io.StringIO(text))
    except FileNotFoundError as error:
        raise RPGError(f"{path}: not found; expected {what}") from error
    except RPGError:
        raise
    except Exception as error:
        raise RPGError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(given, DictConfig):
        raise RPGError(f"{path}: expected a mapping of sections, found {type(given).__name__}")
    plain = OmegaConf.to_container(given)
    _refuse_unknown_keys(plain, schema, prefix="", source=str(path))
    if is_foreign:
        _refuse_interpolations(plain, "", str(path))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
    except OmegaConfBaseException as error:
        raise RPGError(f"{path}: {one_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _check_nesting(text: str) -> None:
    """Refuse what is nested so deep that the parser, which calls itself, would end the process.

    Raises:
        ValueError: if it is; or an error of the parser, if the text is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_NESTED:
            raise ValueError(f"line {event.start_mark.line + 1}: nested more than {_MOST_NESTED} deep")


def _refuse_interpolations(value: Any, key: str, source: str) -> None:
    if isinstance(value, dict):
        for name, each in value.items():
            _refuse_interpolations(each, f"{key}.{name}" if key else str(name), source)
    elif isinstance(value, list):
        for i, each in enumerate(value):
            _refuse_interpolations(each, f"{key}[{i}]", source)
    elif isinstance(value, str) and "${" in value:
        raise RPGError(f"{source}: {key}: expected a plain value, got one that stands for another (${{...}})")


def _to_object(merged: Any, path: Path) -> Any:
    try:
        return OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise RPGError(f"{path}: {one_line(error)}") from error


def _refuse_unknown_keys(given: Any, schema: Any, prefix: str, source: str) -> None:
    if not isinstance(given, dict):
        return
    types = {f.name: f.type for f in fields(schema)}
    for key, value in given.items():
        if key not in types:
            raise RPGError(f"{source}: unknown key '{prefix}{key}'{_nearest(str(key), list(types), prefix)}")
        if is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise RPGError(f"{source}: '{prefix}{key}' is a section: expected a mapping, got {value!r}")
            _refuse_unknown_keys(value, types[key], prefix=f"{prefix}{key}.", source=source)
        elif isinstance(value, list) and is_dataclass(item := _item_type(types[key])):
            for i, each in enumerate(value):
                if not isinstance(each, dict):
                    raise RPGError(f"{source}: '{prefix}{key}[{i}]': expected a mapping, got {each!r}")
                _refuse_unknown_keys(each, item, prefix=f"{prefix}{key}[{i}].", source=source)


def _item_type(kind: Any) -> Any:
    """What a list holds by its type, None for other types."""
    return next(iter(get_args(kind)), None) if get_origin(kind) is list else None


def _nearest(key: str, valid: list[str], prefix: str) -> str:
    if (now := _RENAMED.get(f"{prefix}{key}")) is not None:
        return f"; it is called '{now}' now"
    found = difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    if found:
        return f"; did you mean '{prefix}{found[0]}'?"
    return f"; expected one of {', '.join(prefix + name for name in valid)}" if valid else ""
