"""mamba_ssm's fused kernels, without the minutes of tuning that their first call otherwise takes.

Each of their 14 Triton kernels compiles and times 6 to 11 configurations for every new shape: 40 s for the
forward pass and 72 s for the backward pass on an H100. Here each kernel keeps only the configuration that won
there, with 8 sequences of 1,510 elements of width 8192. Then the first call takes 17 s if Triton's cache is
empty. A training step took 60.9 ms, and 61.4 ms with all configurations to choose from.

The package imports transformers for language models. On a machine that has just started, importing it takes
9.4 s, of which 0.3 s are for the kernels; so they are imported without the rest of it.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

_CHOSEN: dict[str, dict[str, tuple[dict[str, int], int, int]]] = {
    "ssd_bmm": {
        "_bmm_chunk_fwd_kernel": ({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32}, 4, 4),
        "_bmm_chunk_bwd_kernel": ({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_CS": 32}, 4, 4),
    },
    "ssd_chunk_state": {
        "_chunk_cumsum_fwd_kernel": ({"BLOCK_SIZE_H": 16}, 4, 3),
        "_chunk_cumsum_bwd_kernel": ({"BLOCK_SIZE_H": 16}, 4, 3),
        "_chunk_state_fwd_kernel": ({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32}, 4, 4),
        "_chunk_state_bwd_db_kernel": ({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128}, 4, 3),
    },
    "ssd_state_passing": {
        "_state_passing_fwd_kernel": ({"BLOCK_SIZE": 2048}, 4, 3),
        "_state_passing_bwd_kernel": ({"BLOCK_SIZE": 2048}, 4, 3),
    },
    "ssd_chunk_scan": {
        "_chunk_scan_fwd_kernel": ({"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32}, 2, 5),
        "_chunk_scan_bwd_dc_kernel": ({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128}, 4, 3),
        "_chunk_scan_bwd_dcb_kernel": ({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 32}, 4, 3),
        "_chunk_scan_bwd_ddAcs_stable_kernel": ({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 32}, 4, 3),
        "_chunk_scan_bwd_dstates_kernel": (
            {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32}, 4, 4,
        ),
    },
    "ssd_combined": {
        "_chunk_scan_chunk_state_bwd_dx_kernel": (
            {"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32}, 4, 5,
        ),
    },
}  # fmt: skip
"""The chosen configurations by module and kernel: block sizes, warps, pipeline stages."""


@cache
def fused_kernel() -> Callable[..., Any] | None:
    """mamba_ssm's function for a fused layer, or None where mamba_ssm or causal_conv1d is not installed."""
    try:
        import causal_conv1d  # noqa: F401  (the kernel calls it, but imports without it)

        with _without_running("mamba_ssm"):
            combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
            loaded = {module: importlib.import_module(f"mamba_ssm.ops.triton.{module}") for module in _CHOSEN}
        function: Callable[..., Any] = combined.mamba_split_conv1d_scan_combined
    except (ImportError, AttributeError):
        return None
    for module, kernels in _CHOSEN.items():
        for name, chosen in kernels.items():
            _restrict(getattr(loaded[module], name, None), chosen)
    return function


@contextmanager
def _without_running(package: str) -> Iterator[None]:
    """Import modules of a package in the block without running the package's own `__init__`, if nobody has.

    Raises:
        ImportError: if the package is not installed.
    """
    if package in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ImportError(f"no package {package}")
    sys.modules[package] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        # Whoever imports the package afterwards gets all of it.
        del sys.modules[package]


def _restrict(kernel: Any, chosen: tuple[dict[str, int], int, int]) -> None:
    """Leave a kernel only its chosen configuration. If a release of mamba_ssm lacks it, all of them stay."""
    while kernel is not None and not hasattr(kernel, "configs"):
        kernel = getattr(kernel, "fn", None)
    if kernel is None:
        return
    kept = [each for each in kernel.configs if (each.kwargs, each.num_warps, each.num_stages) == chosen]
    kernel.configs = kept or kernel.configs
