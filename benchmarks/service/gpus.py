"""Two generators that want a GPU each, on a machine that has fewer."""

import subprocess
from dataclasses import replace
from pathlib import Path

from benchmarks.service.running import ROOT, Setup, command, config_of
from benchmarks.service.table import Row


def measure(setup: Setup, directory: Path) -> list[Row]:
    """Check that `rpg serve` ends with one line that counts the GPUs."""
    config = config_of(setup, directory)
    first = replace(config.generators[0], num_gpus=1, replicas=1)
    config.generators = [first, replace(first, name="second")]
    line, environment = command(config, directory)
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    said = (result.stderr.strip().splitlines() or [""])[-1]
    refused = result.returncode == 2 and "need 2 GPUs" in said
    return [
        Row("two generators, one GPU each: exit status", f"{result.returncode}", "2", result.returncode == 2),
        Row("what it says", f"`{said}`", "one line that counts them", refused),
    ]  # fmt: skip
