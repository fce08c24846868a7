"""Finding mamba_ssm's kernels and restricting their configurations, with modules that stand for mamba_ssm."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rpg.generator.recurrent.mamba_kernels import fused_kernel

_TUNED = """
class Configuration:
    def __init__(self, kwargs, num_warps, num_stages):
        self.kwargs, self.num_warps, self.num_stages = kwargs, num_warps, num_stages

class Autotuned:
    def __init__(self, *configs):
        self.configs = list(configs)

class Heuristics:
    def __init__(self, fn):
        self.fn = fn

chosen = Configuration({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32}, 4, 4)
other = Configuration({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32}, 4, 3)
_bmm_chunk_fwd_kernel = Heuristics(Autotuned(other, chosen))
_bmm_chunk_bwd_kernel = Autotuned(other)
"""
_MODULES = {
    "__init__": "raise RuntimeError('imports transformers')",
    "ops/__init__": "",
    "ops/triton/__init__": "",
    "ops/triton/ssd_combined": "def mamba_split_conv1d_scan_combined(x): return x",
    "ops/triton/ssd_bmm": _TUNED,
    "ops/triton/ssd_chunk_state": "",
    "ops/triton/ssd_state_passing": "",
    "ops/triton/ssd_chunk_scan": "",
}


def _write(site: Path, name: str, modules: dict[str, str]) -> None:
    for module, text in modules.items():
        file = site / name / f"{module}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


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


def test_the_fused_kernel_is_the_function_of_mamba_ssm(site: Path) -> None:
    _write(site, "mamba_ssm", _MODULES)
    _write(site, "causal_conv1d", {"__init__": ""})
    kernel = fused_kernel.__wrapped__()
    combined = sys.modules["mamba_ssm.ops.triton.ssd_combined"]
    assert kernel is combined.mamba_split_conv1d_scan_combined
    assert kernel(3) == 3


def test_kernels_keep_only_the_chosen_configuration(site: Path) -> None:
    _write(site, "mamba_ssm", _MODULES)
    _write(site, "causal_conv1d", {"__init__": ""})
    fused_kernel.__wrapped__()
    kernels: Any = sys.modules["mamba_ssm.ops.triton.ssd_bmm"]
    assert kernels._bmm_chunk_fwd_kernel.fn.configs == [kernels.chosen]
    # This one does not have the chosen configuration, as in a release that was tuned differently.
    assert kernels._bmm_chunk_bwd_kernel.configs == [kernels.other]


def test_the_package_can_be_imported_as_a_whole_afterwards(site: Path) -> None:
    _write(site, "mamba_ssm", {**_MODULES, "__init__": "from mamba_ssm.ops.triton import ssd_combined"})
    _write(site, "causal_conv1d", {"__init__": ""})
    kernel = fused_kernel.__wrapped__()
    assert "mamba_ssm" not in sys.modules
    package = importlib.import_module("mamba_ssm")
    assert package.ssd_combined.mamba_split_conv1d_scan_combined is kernel


@pytest.mark.parametrize("missing", ["mamba_ssm", "causal_conv1d"])
def test_without_both_packages_there_is_no_fused_kernel(site: Path, missing: str) -> None:
    _write(site, "mamba_ssm", _MODULES)
    _write(site, "causal_conv1d", {"__init__": ""})
    shutil.rmtree(site / missing)
    assert fused_kernel.__wrapped__() is None
