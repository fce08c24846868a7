"""Measure the service, and print a table as Markdown.

    python -m benchmarks.service chaos --generator runs/digits/generator
    python -m benchmarks.service all --generator runs/digits/generator --minutes 5 --num-gpus 1

Measurements: chaos, latency, listeners, packing, start, soak, gpus; `all` is each in turn. Everything is a
real `rpg serve` on a Ray of its own, called through `rpg.client`. The generator takes class vectors, as that
of `make demo`.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.service import chaos, gpus, latency, listeners, packing, soak, start
from benchmarks.service.running import Setup
from benchmarks.service.table import Row, load, show
from rpg.config import generator_config_from_yaml
from rpg.generator.saving import CONFIG_FILE


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ("chaos", "latency", "listeners", "packing", "start", "soak", "gpus")
    parser.add_argument("what", choices=[*names, "all"])
    parser.add_argument("--generator", type=Path, required=True, help="directory of a saved generator")
    parser.add_argument("--num-gpus", type=int, choices=(0, 1), default=0, help="of a replica")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--num-cpus", type=int, default=os.cpu_count(), help="that Ray is told of")
    parser.add_argument(
        "--minutes", type=float, help="of load: 5 (chaos), 1 (latency, listeners, packing), 20 (soak)"
    )
    parser.add_argument("--models", type=int, default=100, help="of each of chaos's 200 jobs")
    options = parser.parse_args()
    generator = options.generator.absolute()
    size = generator_config_from_yaml(generator / CONFIG_FILE).condition.size
    setup = Setup(generator, size, options.replicas, options.num_gpus, options.num_cpus)

    def minutes(default: float) -> float:
        return default if options.minutes is None else options.minutes

    measurements: dict[str, Callable[[Path], list[Row]]] = {
        "chaos": lambda at: chaos.measure(setup, at, minutes(5), options.models),
        "latency": lambda at: latency.measure(setup, at, minutes(1)),
        "listeners": lambda at: listeners.measure(setup, at, minutes(1)),
        "packing": lambda at: packing.measure(setup, at, minutes(1)),
        "start": lambda at: start.measure(setup, at),
        "soak": lambda at: soak.measure(setup, at, minutes(20)),
        "gpus": lambda at: gpus.measure(setup, at),
    }
    with tempfile.TemporaryDirectory(prefix="rpg-") as directory:
        for name in names if options.what == "all" else (options.what,):
            before = load()
            rows = measurements[name](Path(directory) / name)
            show(name, rows, setup, before)


if __name__ == "__main__":
    main()
