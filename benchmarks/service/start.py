"""Time to the first model: of a service that starts, of one that runs, of one that has lost its replica."""

import os
import signal
import statistics
import time
from pathlib import Path

from benchmarks.service.running import GENERATOR, Setup, running
from benchmarks.service.table import Row

ROUNDS = 3


def measure(setup: Setup, directory: Path) -> list[Row]:
    """Measure each time as the median of three."""
    ready, cold, warm, again = [], [], [], []
    for i in range(ROUNDS):
        start = time.monotonic()
        with running(setup, directory / str(i)) as service, service.client() as client:
            ready.append(time.monotonic() - start)
            client.generate(GENERATOR, setup.condition(0))
            cold.append(time.monotonic() - start)
            for seed in range(1, 6):
                began = time.monotonic()
                client.generate(GENERATOR, setup.condition(0), seed=seed)
                warm.append(time.monotonic() - began)
            began = time.monotonic()
            os.kill(service.part(f"rpg.{GENERATOR}."), signal.SIGKILL)
            client.generate(GENERATOR, setup.condition(0), seed=7)
            again.append(time.monotonic() - began)
    return [
        Row("cold: from `rpg serve`, with a Ray of its own, to its address", _seconds(ready)),
        Row("cold: from `rpg serve` to the first model in the client's hands", _seconds(cold)),
        Row("warm: from the request to the model in the client's hands", _seconds(warm)),
        Row("from SIGKILL of the only replica to the next model", _seconds(again)),
    ]


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} s ({min(values):.3g} to {max(values):.3g})"
