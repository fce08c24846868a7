"""Task families: what networks of a collection are for, and how well they do it.

A family is a plug-in. It is named by `tasks` of a run's config: a Python file and a class
(`my_tasks.py:MyTasks`), an importable module and a class (`package.module:MyTasks`), or the name of an entry
point of the group `rpg.families`, as the built-in ones are. `docs/families.md` has an example. A network of
torchvision or timm is a family by its name (`timm:convnext_pico`), see `rpg.tasks.image_classifiers`.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import nn

from rpg.collection.collection import FAMILY, Collection
from rpg.errors import RPGError, one_line
from rpg.tasks.named_networks import is_named_network

ENTRY_POINTS = "rpg.families"
_CLASSIFIERS = "rpg.tasks.image_classifiers"
"""The module of the families of torchvision's and timm's networks, imported when one is named."""

Asked = list[float] | str | None
"""What a network was made for, as a family is told: a condition, a description where the collection has
descriptions, or None for a collection without conditions."""


@dataclass(frozen=True)
class Metric:
    """A number that says how good a network is."""

    name: str
    higher_is_better: bool = True
    unit: str = ""


@dataclass(frozen=True)
class Task:
    """A task that stage `collect` trains networks for."""

    name: str
    """Unique among the tasks; part of file names, and the task's name in reports."""
    condition: list[float]
    split: str = "train"
    """`train`, `validation` or `heldout` (`rpg.config.Split`)."""


class TaskFamily(Protocol):
    """What every family has. Its constructor may name the parameters `images` (the setting `collect.images`)
    and `device` (where networks run), and is given those that it names.

    It also has one of these, or both:

    - `evaluate(network, condition) -> {metric: value}`: how well a network does what `condition` asks.
      `network` is a `build_network()` with the checkpoint's weights, in evaluation mode.
    - `predict(network, split) -> Tensor [inputs]` and `labels(condition, split) -> Tensor [inputs]`: what a
      network answers on a split's fixed inputs, and what is right. They give the accuracy, the similarity of
      networks by their wrong answers, and the baseline of the majority class.

    `condition` is a list of numbers, the text where the collection has descriptions, or None. Each of these
    may be there as well:

    - a parameter `split` of `evaluate`: `validation` data choose the generator and settings, `test` data are
      for the report;
    - `metrics`: a list of `Metric`, the one that counts first. Without it, higher is better, and the first
      metric that `evaluate` returns counts;
    - `task_name(condition) -> str`: different tasks have different names;
    - `load(network, state_dict)`: puts a checkpoint into a network, where `load_state_dict(strict=True)` does
      not;
    - `predict_many(state_dicts, split) -> Tensor [networks, inputs]`: `predict` for many networks at once,
      where the family knows something faster than `torch.func.vmap`;
    - `check()`: raises an error if data are missing, before any work is done;
    - `references(backbone, condition, split) -> {name: Tensor [inputs]}`: what networks answer by themselves
      that were not trained for the task, such as a classifier of ten classes a question about some of them.
      `backbone` is the state dict that the family's `backbone(config, seed)` returned. Each name is a row of
      the report, with the accuracy by `labels(condition, split)`;
    - `uses_gpu`: True if its networks are trained and run on a GPU where there is one;
    - for stage `collect`: `tasks(validation_tasks, seed) -> [Task]`, `backbone(config, seed) -> state_dict`,
      and `fine_tune(backbone, models, config, seed) -> [state_dict]` for `models`, a list of (`Task`, copy);
      and `copies_share_order`: True if models of one copy see the data in the same order, so that the copy's
      number is their permutation state;
    - instead of these, for a collection without conditions: `checkpoints(config, seed, state)`, which yields
      the state dicts of its networks, one after the other, and where it likes lines of text that say how far
      it is. In the file `state` it may keep what it needs to go on if it is killed.
    """

    def build_network(self) -> nn.Module:
        """A network that checkpoints of the family load into."""


def load_family(name: str, images: str = "", device: torch.device | None = None) -> Any:
    """The family that `tasks` names.

    Args:
        name: an entry point's name, `FILE.py:CLASS`, `MODULE:CLASS`, `torchvision:NAME` or `timm:NAME`.
        images: directory or URI of images, for families that take them.
        device: where networks are trained and run, for families that take it; None: the CPU.

    Raises:
        RPGError: if there is none, it cannot be imported or made, or it lacks a method.
    """
    family = _construct(_find(name), name, images, device or torch.device("cpu"))
    if not callable(getattr(family, "build_network", None)):
        raise RPGError(f"tasks: '{name}' has no method build_network")
    if not (can_evaluate(family) or can_predict(family)):
        raise RPGError(f"tasks: '{name}' has neither a method evaluate, nor methods predict and labels")
    return family


def can_evaluate(family: Any) -> bool:
    """Whether a family has metrics of its own."""
    return callable(getattr(family, "evaluate", None))


def can_predict(family: Any) -> bool:
    """Whether a family says what networks answer on fixed inputs, and what is right."""
    predicts = any(callable(getattr(family, method, None)) for method in ("predict", "predict_many"))
    return predicts and callable(getattr(family, "labels", None))


def takes_split(evaluate: Callable[..., Any]) -> bool:
    """Whether a family's `evaluate` is to be told which split's data to use."""
    return "split" in inspect.signature(evaluate).parameters


def can_collect(family: Any) -> bool:
    """Whether networks of the family can be trained by stage `collect`."""
    return all(callable(getattr(family, method, None)) for method in ("tasks", "backbone", "fine_tune"))


def has_checkpoints(family: Any) -> bool:
    """Whether stage `collect` makes a collection without conditions of the family's networks."""
    return callable(getattr(family, "checkpoints", None))


def check_family(family: Any, name: str) -> None:
    """Have a family check that its data are there, if it can.

    Raises:
        RPGError: if they are not.
    """
    if callable(getattr(family, "check", None)):
        with calling(name, "check"):
            family.check()


def uses_gpu(name: str) -> bool:
    """Whether a family's networks are trained and run on a GPU if there is one.

    Raises:
        RPGError: if there is no such family.
    """
    return bool(getattr(_find(name), "uses_gpu", False))


@contextmanager
def calling(name: str, method: str) -> Iterator[None]:
    """Turn what a family's code raises in the block into one line that names file and line.

    Raises:
        RPGError: for any exception.
    """
    try:
        yield
    except RPGError:
        raise
    # A script that has no `if __name__ == "__main__"` may end the program when it is imported.
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        # The last frame may lie in a library; the family's author looks for a line of their own.
        own = [frame for frame in frames if _is_foreign(frame.filename)]
        where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
        raise RPGError(f"{name}: {method}: {type(error).__name__}: {one_line(error)}{where}") from error


def family_of(collection: Collection) -> str:
    """Name of the family that a collection's file names.

    Such a file is data, which may come from anywhere. So it may name what is installed, and no file to
    execute.

    Raises:
        RPGError: if it names none, or one that is not installed.
    """
    if FAMILY not in collection.architecture:
        raise RPGError(
            f"{collection.root}: does not say which task family its networks belong to; "
            "name one with tasks=, or a test with evaluate.command="
        )
    name = str(collection.architecture[FAMILY])
    if ":" in name and not is_named_network(name):
        raise RPGError(
            f"{collection.root}: was made by the task family '{name}', which is code; to run it: tasks={name}"
        )
    return name


def installed_families() -> dict[str, list[importlib.metadata.EntryPoint]]:
    """The families that installed packages bring, by name."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        found.setdefault(point.name, []).append(point)
    return found


def _find(name: str) -> Any:
    """The class that a name stands for."""
    if is_named_network(name):
        return _module(_CLASSIFIERS, name).classifier_of(name)
    if ":" in name:
        module, _, attribute = name.rpartition(":")
        loaded = _module_of_file(Path(module), name) if module.endswith(".py") else _module(module, name)
        if not callable(found := getattr(loaded, attribute, None)):
            raise RPGError(f"tasks: '{name}': {module} has no class {attribute}")
        return found
    installed = installed_families()
    if name not in installed:
        raise RPGError(
            f"tasks: expected {', '.join(sorted(installed))}, a network as torchvision:NAME or timm:NAME, "
            f"or a class of your own as FILE.py:CLASS or MODULE:CLASS, got '{name}'"
        )
    values = sorted({point.value for point in installed[name]})
    if len(values) > 1:
        raise RPGError(f"tasks: '{name}' is the name of several installed families: {', '.join(values)}")
    with calling(f"tasks: '{name}'", "import"):
        return installed[name][0].load()


def _module_of_file(path: Path, name: str) -> ModuleType:
    """The module in a Python file, which is executed once in a process as long as it does not change."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError as error:
        raise RPGError(f"tasks: '{name}': {path}: {error.strerror}; expected a Python file") from error
    known = sys.modules.get(path.stem)
    if known is not None and getattr(known, "__rpg_file__", None) == (str(path.absolute()), changed):
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__dict__["__rpg_file__"] = (str(path.absolute()), changed)
    # Its own imports may name files that lie beside it, as they could if Python ran it.
    beside = str(path.parent.absolute())
    if beside not in sys.path:
        sys.path.append(beside)
    if path.stem in sys.modules and known is not None and not hasattr(known, "__rpg_file__"):
        raise RPGError(f"tasks: '{name}': a module called {path.stem} is imported already; rename the file")
    # Pickle, dataclasses and Ray find a class by its module's name.
    sys.modules[path.stem] = module
    try:
        with calling(f"tasks: '{name}'", "import"):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def _module(module: str, name: str) -> ModuleType:
    with calling(f"tasks: '{name}'", "import"):
        return importlib.import_module(module)


def _construct(found: Any, name: str, images: str, device: torch.device) -> Any:
    given: dict[str, Any] = {"images": images, "device": device}
    with calling(f"tasks: '{name}'", "constructor"):
        parameters = inspect.signature(found).parameters
        return found(**{key: value for key, value in given.items() if key in parameters})


def _is_foreign(filename: str) -> bool:
    """Whether code lies outside of this package and of installed ones."""
    path, project = Path(filename), Path(__file__).parents[2]
    ours = (*(project / name for name in ("rpg", "ray_jobs", "serve")), Path(sysconfig.get_path("stdlib")))
    return path.is_file() and not any(map(path.is_relative_to, ours)) and "site-packages" not in path.parts
