"""The results of a measurement as Markdown."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import ray
import torch

from benchmarks.service.running import Setup


class Row(NamedTuple):
    """One line of the table: the measurement, its result, the target, and whether it was reached."""

    what: str
    measured: str
    wanted: str = ""
    reached: bool | None = None


def load() -> str:
    """How busy the machine is."""
    return f"{os.getloadavg()[0]:.1f}"


def show(title: str, rows: Sequence[Row], setup: Setup, load_before: str) -> None:
    """Print the table, with the machine and the versions above it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "CPU")
    device = f", {torch.cuda.get_device_name()}" if setup.num_gpus else ""
    print(
        f"\n{title}: {processor}, {os.cpu_count()} CPUs{device}; {setup.replicas} replicas of "
        f"{setup.num_gpus} GPUs; Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"Ray {ray.__version__}; load {load_before} before, {load()} after\n"
    )
    print("| what | measured | to reach | |\n| --- | ---: | ---: | --- |")
    for row in rows:
        verdict = "" if row.reached is None else "yes" if row.reached else "**no**"
        print(f"| {row.what} | {row.measured} | {row.wanted} | {verdict} |")
