"""The first call of Mamba-2's kernels in a process: compiled in turn, side by side, and from Triton's cache.

    python benchmarks/mamba_first_call.py     # on a GPU with mamba_ssm; prints a table as Markdown

A layer as the published generator has for ResNet-18s, 8 sequences of 1,510 elements, forward and backward in
bfloat16. Every row is a process of its own. Output and gradients of the call are compared with those of
mamba_ssm's function as it comes.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from rpg.generator.recurrent import mamba2
from rpg.generator.recurrent.mamba_kernels import fused_kernel

WIDTH, LENGTH, BATCH = 8192, 1510, 8
ROWS = {
    "in turn, empty cache": "in turn",
    "side by side, empty cache": "side by side",
    "the next process": "side by side",
}
"""How kernels are compiled; the last row's process finds those of the one before."""


@dataclass(frozen=True)
class Seconds:
    """What one process measured."""

    imports: float
    first: float
    second: float
    error: float
    """Largest relative error of output and gradients."""


def measure(how: str) -> Seconds:
    """Take the first calls of this process."""
    torch.zeros(1, device="cuda")
    # Every optimiser imports it at its first step, and einops before that: it compares versions as strings.
    importlib.import_module("torch._dynamo")
    began = time.perf_counter()
    kernel = fused_kernel()
    imports = time.perf_counter() - began
    if kernel is None:
        sys.exit("mamba_ssm and causal_conv1d cannot be imported")
    original = kernel.function
    if how == "in turn":
        vars(mamba2)["fused_kernel"] = lambda: original
    torch.manual_seed(0)
    layer = mamba2.Mamba2(WIDTH, d_state=128, d_conv=4, expand=2, headdim=64).cuda()
    results, first = _timed_step(layer)
    _, second = _timed_step(layer)
    vars(mamba2)["fused_kernel"] = lambda: original
    expected, _ = _timed_step(layer)
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True)]
    return Seconds(imports, first, second, max(errors))


def _timed_step(layer: mamba2.Mamba2) -> tuple[list[Tensor], float]:
    """Output and gradients, float32, and the seconds that they took."""
    layer.zero_grad()
    draw = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(BATCH, LENGTH, WIDTH, device="cuda", generator=draw, requires_grad=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16):
        out, _ = layer(x, keep_state=False)
    torch.autograd.backward(out.float().square().mean())
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    gradients = [each.grad for each in (x, *layer.parameters())]
    return [each.detach().float().clone() for each in (out, *gradients) if each is not None], seconds


def main() -> None:
    """Measure every row in a fresh process."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", choices=sorted(set(ROWS.values())), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU with mamba_ssm")
    if given.measure:
        print(json.dumps(asdict(measure(given.measure))))
        return
    print(
        f"{torch.cuda.get_device_name()}, {os.cpu_count()} CPUs; PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}\n"
    )
    print("| kernels | import | first call | second call | largest relative error |")
    print("| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as caches:
        for name, how in ROWS.items():
            environment = os.environ | {"TRITON_CACHE_DIR": f"{caches}/{how}"}
            command = [sys.executable, __file__, "--measure", how]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            found = Seconds(**json.loads(done.stdout.splitlines()[-1]))
            print(
                f"| {name} | {found.imports:.1f} s | {found.first:.1f} s | {found.second:.2f} s | "
                f"{found.error:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
