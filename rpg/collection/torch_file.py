"""PyTorch's files: which of what they hold is a `state_dict`. Nothing in them is executed.

PyTorch's own restricted reader (`weights_only`) interprets the pickle. It calls nothing but what builds
tensors and containers. Every other class that a file names is replaced by a placeholder without behaviour, so
that weights which lie beside settings or NumPy values can be taken.
"""

import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch._weights_only_unpickler import _get_allowed_globals

from rpg.errors import RPGError

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""How files begin that PyTorch wrote before version 1.6."""
_NEVER = "RPG never executes a pickle: save a plain state_dict or .safetensors"
_SHARDED = ("torch.distributed.tensor.", "torch.distributed._tensor.", "torch.distributed._shard.")
_QUANTISED = {
    "torchao.": "torchao",
    "bitsandbytes.": "bitsandbytes",
    "torch.ao.": "torch.ao",
    "torch.ScriptObject": "torch.ao",
    "optimum.quanto.": "quanto",
    "hqq.": "HQQ",
}
"""Beginnings of the names of classes that hold quantised weights, and whose they are."""
_SETTINGS = ("Arguments", "Args", "Config", "Namespace", "Options")
"""Ends of the names of classes whose objects are settings, such as Transformers' `training_args.bin`."""
_BESIDE = {
    "a scheduler's state": {"last_epoch"},
    "the state of a gradient scaler": {"scale", "growth_factor"},
    "the state of random number generators": {"python", "numpy"},
    "the states of random number generators": {"random_state", "numpy_random_seed"},
}
"""Content of files without weights, by keys that they have."""
_DEPTH = 8
"""How deep mappings may lie in each other to be looked at."""
_ORDINARY = re.compile(
    r"torch\.\w+|torch\._utils\.\w+|torch\._tensor\.\w+|torch\.nn\.parameter\.\w+|torch\.serialization\.\w+"
    r"|torch\.storage\.\w+|collections\.(OrderedDict|Counter)|_codecs\.encode"
    r"|builtins\.(set|complex|bytearray)"
)
"""What tensors and containers are built from, all of which PyTorch knows."""

# PyTorch keeps one list of the classes that it may build, for all threads.
_lock = threading.Lock()


class OtherContentError(RPGError):
    """A file holds no network's weights, but what training keeps beside them; `content` says what."""

    def __init__(self, path: Path, content: str) -> None:
        super().__init__(f"{path}: holds {content}; expected the weights of a network")
        self.content = content


class Placeholder:
    """Stands for an object of a class that is not built. It only remembers what the object was made of."""

    def __new__(cls, *arguments: Any) -> Any:
        """Ignore what the class itself would do; `arguments` are kept, to be looked through for tensors."""
        made = super().__new__(cls)
        made.parts = [arguments]
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.parts.append(state)

    parts: list[Any]


class _MappingPlaceholder(Placeholder):
    """Stands for a class that turned out to be a mapping; what is made of it is an `OrderedDict`."""

    def __new__(cls, *arguments: Any) -> Any:
        return OrderedDict()


class _ListPlaceholder(Placeholder):
    """Stands for a class that turned out to be a list."""

    def __new__(cls, *arguments: Any) -> Any:
        return []


def read_torch_file(path: Path, key: str | None) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a PyTorch file, and the names of what lies among its tensors without being one.

    A mapping from names to tensors is looked for at any depth. The state of optimisers is no candidate.

    Args:
        path: of the file.
        key: the mapping to take, as in `Reading.key`; None: the only one.

    Raises:
        OtherContentError: if the file holds the state of an optimiser, a scheduler or the like.
        RPGError: naming the file and what in it cannot be used: if it is truncated, holds no mapping of
            tensors or several, or holds them in objects that would have to be executed.
    """
    loaded = _load(path)
    if isinstance(loaded, Placeholder):
        name = _class_name(loaded)
        if name.endswith(_SETTINGS) and not _holds_tensors(loaded):
            raise OtherContentError(path, f"settings of training ({name})")
        raise RPGError(f"{path}: holds an object of class {name}; {_NEVER}")
    if not isinstance(loaded, dict):
        if isinstance(loaded, Tensor) and loaded.dtype == torch.uint8 and loaded.dim() == 1:
            raise OtherContentError(path, "the state of a random number generator")
        raise RPGError(f"{path}: holds a {type(loaded).__name__}; expected a state_dict")
    tensors, left_out = _tensors(_chosen(loaded, key, path), path)
    _check_stored(tensors, path)
    return tensors, left_out


def is_torch_archive(path: Path) -> bool:
    """Whether a file that begins with `ZIP_MAGIC` is one of PyTorch's, or is truncated or corrupt."""
    # A corrupt directory can make the reader fail in any way.
    with suppress(Exception), zipfile.ZipFile(path) as archive:
        return any(name.endswith(("/data.pkl", "/constants.pkl")) for name in archive.namelist())
    return True


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        is_zip = file.read(4) == ZIP_MAGIC
    if is_zip:
        _check_archive(path)
    try:
        return _interpret(path, is_zip, [])
    # A corrupt file can make the reader fail in any way.
    except Exception as error:
        names = _globals(path, is_zip)
        _refuse_known(names, path)
        if not isinstance(error, pickle.UnpicklingError):
            raise RPGError(f"{path}: truncated or corrupt; expected a PyTorch checkpoint") from error
    foreign = [name for name in names if not _ORDINARY.fullmatch(name)]
    shown = ", ".join(foreign[:3]) or "Python objects"
    forms: dict[str, type[Placeholder]] = dict.fromkeys(foreign, Placeholder)
    while True:
        placeholders = {name: _placeholder(name, form) for name, form in forms.items()}
        try:
            return _interpret(path, is_zip, placeholders.values())
        except Exception as error:
            # PyTorch says which class would have to be a container, since items are put into its object.
            message = str(error)
            wrong = [
                name
                for name, made in placeholders.items()
                if forms[name] is Placeholder and repr(made) in message
            ]
            if not wrong:
                raise RPGError(f"{path}: holds {shown} besides tensors; {_NEVER}") from error
            forms[wrong[0]] = _MappingPlaceholder if "Can only SETITEM" in message else _ListPlaceholder


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode` as pickles use it for bytes; other codecs lengthen what they are given."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding}")
    return text.encode("latin1")


def _bytearray(content: bytes = b"") -> bytearray:
    """`bytearray` of bytes that a file holds; of a number it would be as many zeros."""
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError(f"bytearray of {type(content).__name__}")
    return bytearray(content)


_BOUNDED = {"_codecs.encode": _latin1, "builtins.bytearray": _bytearray}
"""What PyTorch may call that makes much of little, and what is called in its place."""


@contextmanager
def _bounded_calls() -> Iterator[None]:
    known = _get_allowed_globals()
    usual = {name: known[name] for name in _BOUNDED if name in known}
    known.update({name: _BOUNDED[name] for name in usual})
    try:
        yield
    finally:
        known.update(usual)


def _interpret(path: Path, is_zip: bool, placeholders: Collection[type[Placeholder]]) -> Any:
    with _lock, _bounded_calls(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Other packages add classes of theirs to PyTorch's list. A file must be read the same without them.
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals(list(placeholders))
            return torch.load(path, weights_only=True, map_location="cpu", mmap=is_zip)
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def _globals(path: Path, is_zip: bool) -> list[str]:
    """The classes and functions that the pickles of a file name, as far as they can be read."""
    names: dict[str, None] = {}
    # A corrupt file can make the readers fail in any way.
    with suppress(Exception):
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                inner = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
                with archive.open(inner) as file:
                    names |= _globals_in(file)
        else:
            with path.open("rb") as file:
                # The pickles before and after that of the object hold numbers and names only.
                for _ in range(4):
                    names |= _globals_in(file)
    return list(names)


def _globals_in(file: IO[bytes]) -> dict[str, None]:
    names: dict[str, None] = {}
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL" and argument is not None:
            module, _, name = str(argument).partition(" ")
            # Protocol 2 writes the names of Python 2.
            if (module, name) in NAME_MAPPING:
                module, name = NAME_MAPPING[module, name]
            module = IMPORT_MAPPING.get(module, module)
            names[f"{module}.{name}"] = None
    return names


def _refuse_known(names: Collection[str], path: Path) -> None:
    """Refuse what is recognised by the classes that a file names."""
    for name in names:
        for beginning, whose in _QUANTISED.items():
            if name.startswith(beginning):
                raise RPGError(
                    f"{path}: holds weights quantised by {whose} ({name}); expected floating-point weights: "
                    "dequantise the network, or save it before it is quantised"
                )
        if name.startswith(_SHARDED):
            raise RPGError(
                f"{path}: holds sharded tensors ({name}), of which each process has a part; expected whole "
                "ones: save get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))"
            )


def _placeholder(name: str, form: type[Placeholder]) -> type[Placeholder]:
    module, _, qualified = name.rpartition(".")
    made = type("Placeholder", (form,), {})
    # PyTorch finds the class by these.
    made.__module__, made.__qualname__ = module, qualified
    return made


def _class_name(value: Placeholder) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _check_archive(path: Path) -> None:
    """Refuse TorchScript, and compressed values: PyTorch maps files, and packed bytes are no values."""
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
    # A corrupt directory can make the reader fail in any way.
    except Exception as error:
        raise RPGError(f"{path}: truncated or corrupt; expected a PyTorch checkpoint") from error
    if any(file.filename.endswith("/constants.pkl") for file in files):
        raise RPGError(f"{path}: is a TorchScript archive, which holds a program; {_NEVER}")
    for file in files:
        if file.compress_type != zipfile.ZIP_STORED:
            raise RPGError(
                f"{path}: '{file.filename:.80}' in it is compressed; expected a file as torch.save writes it"
            )


def _chosen(loaded: dict[Any, Any], key: str | None, path: Path) -> dict[Any, Any]:
    """The mapping of tensors that `key` names, or the only one."""
    found = list(_mappings(loaded, "", set(), _is_of_weights))
    if not found and (content := _other_content(loaded)):
        raise OtherContentError(path, content)
    if not found:
        found = list(_mappings(loaded, "", set(), _has_tensors))
    if key is not None:
        for place, mapping in found:
            if place == key:
                return mapping
        choices = (
            " and ".join(f"'{place}'" for place, _ in found if place) or "no mapping of tensors by a key"
        )
        raise RPGError(f"{path}: holds {choices}; expected '{key}'")
    if not found:
        raise _no_weights(loaded, path)
    if len(found) == 1:
        return found[0][1]
    choices = ", ".join(
        f"'{place}' ({len(mapping)} entries)" if place else f"{len(mapping)} entries by themselves"
        for place, mapping in found
    )
    raise RPGError(
        f"{path}: holds several mappings of tensors: {choices}; expected one, "
        "or its name as `rpg register --key NAME`"
    )


def _mappings(
    value: dict[Any, Any],
    place: str,
    seen: set[int],
    wanted: Callable[[dict[Any, Any]], bool],
    depth: int = 0,
) -> Iterator[tuple[str, dict[Any, Any]]]:
    """The `wanted` ones among a mapping and those inside of it, with their keys joined by dots."""
    if id(value) in seen or depth > _DEPTH or _is_optimiser(value):
        return
    seen.add(id(value))
    if wanted(value):
        yield place, value
    # The method of the class is called, because a file may set attributes of an OrderedDict.
    for key, item in dict.items(value):
        if isinstance(key, str) and isinstance(item, dict):
            yield from _mappings(item, f"{place}.{key}" if place else key, seen, wanted, depth + 1)


def _is_of_weights(value: dict[Any, Any]) -> bool:
    """Whether a mapping holds more than counters and losses."""
    return any(
        isinstance(item, Tensor) and Tensor.is_floating_point(item) and Tensor.dim(item) > 0
        for item in dict.values(value)
    )


def _has_tensors(value: dict[Any, Any]) -> bool:
    return any(isinstance(item, Tensor) for item in dict.values(value))


def _is_optimiser(value: dict[Any, Any]) -> bool:
    return dict.keys(value) >= {"state", "param_groups"}


def _other_content(loaded: dict[Any, Any]) -> str | None:
    """What training keeps beside a network, if a file without weights holds that."""
    inside = [value for value in dict.values(loaded) if isinstance(value, dict)]
    holds_objects = any(
        isinstance(value, Placeholder) and _holds_tensors(value) for value in dict.values(loaded)
    )
    if (_is_optimiser(loaded) or any(map(_is_optimiser, inside))) and not holds_objects:
        return "an optimiser's state"
    keys = {key for key in dict.keys(loaded) if isinstance(key, str)}
    return next((content for content, some in _BESIDE.items() if keys >= some), None)


def _no_weights(loaded: dict[Any, Any], path: Path) -> RPGError:
    """What to say of a file without tensors."""
    for key, value in dict.items(loaded):
        if isinstance(value, Placeholder) and _holds_tensors(value):
            return RPGError(
                f"{path}: holds no state_dict, but an object of class {_class_name(value)} as {key!r:.40}; "
                f"{_NEVER}"
            )
    inside = [value for value in dict.values(loaded) if isinstance(value, dict)]
    if not loaded or (inside and not any(inside)):
        return RPGError(f"{path}: the state_dict is empty; expected at least one tensor")
    return RPGError(f"{path}: holds no tensors by their names, but {_listed(loaded)}; expected a state_dict")


def _listed(loaded: dict[Any, Any]) -> str:
    shown = [f"{key!r:.40}" for key in list(dict.keys(loaded))[:3]]
    return ", ".join(shown) + (", ..." if len(loaded) > 3 else "")


def _tensors(mapping: dict[Any, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a state dict, without what a file may have attached to them; names of other entries."""
    tensors: dict[str, Tensor] = {}
    left_out: list[str] = []
    for name, value in dict.items(mapping):
        if isinstance(value, Tensor):
            if not isinstance(name, str):
                raise RPGError(f"{path}: key {name!r:.80} is not a tensor name; expected a state_dict")
            plain = Tensor.detach(value)
            if type(plain) is not Tensor:
                kind = f"{type(plain).__module__}.{type(plain).__qualname__}"
                raise RPGError(
                    f"{path}: tensor '{name}' is of class {kind}; expected an ordinary one: dequantise or "
                    "unshard the network before it is saved"
                )
            tensors[name] = plain
        elif _holds_tensors(value):
            raise RPGError(
                f"{path}: '{name}': expected a tensor, found a {type(value).__qualname__} with tensors in it"
            )
        else:
            left_out.append(str(name))
    return tensors, left_out


def _check_stored(tensors: dict[str, Tensor], path: Path) -> None:
    """Refuse tensors whose values are not in the file, as those of `torch.Tensor(NUMBER)` are not."""
    # Tensors of other layouts are refused by what they are.
    dense = [tensor.untyped_storage() for tensor in tensors.values() if tensor.layout == torch.strided]
    needed = sum({storage.data_ptr(): storage.nbytes() for storage in dense}.values())
    size = path.stat().st_size
    if needed > size:
        raise RPGError(
            f"{path}: has {size} bytes for tensors of {needed} bytes; expected every value to be stored"
        )


def _holds_tensors(value: Any) -> bool:
    """Whether there is a tensor or a storage anywhere in a value."""
    waiting, seen = [value], set[int]()
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor | torch.UntypedStorage | torch.TypedStorage):
            return True
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, dict):
            waiting += [*dict.keys(item), *dict.values(item)]
        elif isinstance(item, list | tuple | set):
            waiting += list(item)
        elif isinstance(item, Placeholder):
            waiting += item.parts
    return False
