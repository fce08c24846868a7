"""Importing a package's kernels without its `__init__`; packages of the tests' own stand for mamba_ssm."""

import importlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rpg.generator.recurrent.compiled_together import CompiledTogether
from rpg.generator.recurrent.deferred_package import defer_init
from rpg.generator.recurrent.mamba_kernels import fused_kernel

_INIT = """
import time
from {0}.ops.part import part
time.sleep(0.1)
import {0}.late
Whole = part + 1
"""
_MODULES = {
    "__init__": _INIT,
    "late": "import {0}\nassert {0}.part == 1 and not hasattr({0}, 'Whole')",
    "ops/__init__": "",
    "ops/part": "part = 1",
    "ops/triton/__init__": "",
    "ops/triton/ssd_combined": "def mamba_split_conv1d_scan_combined(x): return x",
    "ops/triton/ssd_bmm": "",
    "ops/triton/ssd_chunk_state": "",
    "ops/triton/ssd_state_passing": "",
    "ops/triton/ssd_chunk_scan": "",
}


def _write(site: Path, name: str, modules: dict[str, str]) -> None:
    for module, text in modules.items():
        file = site / name / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(name) + "\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that Python imports from; what is imported from it is forgotten afterwards."""
    before = dict(sys.modules)
    for name in list(sys.modules):
        if name.partition(".")[0] in ("mamba_ssm", "causal_conv1d"):
            del sys.modules[name]
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]
    sys.modules.update(before)


@pytest.fixture
def package(site: Path) -> ModuleType:
    """Its `ops.part` was imported without its `__init__`."""
    _write(site, "whole_package", _MODULES)
    defer_init("whole_package")
    assert importlib.import_module("whole_package.ops.part").part == 1
    package = importlib.import_module("whole_package")
    assert "Whole" not in vars(package)
    return package


def test_init_is_executed_when_something_of_it_is_asked_for(package: ModuleType) -> None:
    part = package.ops.part
    assert "Whole" not in vars(package)
    assert package.Whole == 2
    assert package.ops.part is part is sys.modules["whole_package.ops.part"]
    with pytest.raises(AttributeError, match="module 'whole_package' has no attribute 'nothing'"):
        _ = package.nothing


@pytest.mark.parametrize("names", ["Whole", "*"])
def test_names_can_be_imported_from_it(names: str, package: ModuleType) -> None:
    found: dict[str, Any] = {}
    exec(f"from whole_package import {names}", found)
    assert found["Whole"] == 2


def test_threads_wait_for_its_init(package: ModuleType) -> None:
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(package.Whole)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2, 2, 2]


def test_an_init_that_fails_says_so_each_time(site: Path) -> None:
    _write(site, "failing_package", {"__init__": "import there_is_no_such_thing", "part": "part = 1"})
    defer_init("failing_package")
    package = importlib.import_module("failing_package")
    assert importlib.import_module("failing_package.part").part == 1
    for _ in range(2):
        with pytest.raises(ImportError, match="there_is_no_such_thing"):
            _ = package.Whole


def test_what_was_imported_before_stays(site: Path) -> None:
    _write(site, "whole_package", _MODULES)
    package = importlib.import_module("whole_package")
    defer_init("whole_package")
    defer_init("there_is_no_such_package")
    assert sys.modules["whole_package"] is package
    assert "__getattr__" not in vars(package)


def test_the_fused_kernel_is_found_without_all_of_mamba_ssm(site: Path) -> None:
    pytest.importorskip("triton")
    _write(site, "mamba_ssm", _MODULES)
    _write(site, "causal_conv1d", {"__init__": ""})
    kernel = fused_kernel.__wrapped__()
    assert isinstance(kernel, CompiledTogether)
    assert kernel(3) == 3
    assert "Whole" not in vars(sys.modules["mamba_ssm"])
    assert importlib.import_module("mamba_ssm").Whole == 2


def test_without_mamba_ssm_there_is_no_fused_kernel(site: Path) -> None:
    _write(site, "causal_conv1d", {"__init__": "raise ImportError"})
    assert fused_kernel.__wrapped__() is None
