"""How long it takes to generate networks, in a process that has generated before."""

import time
from pathlib import Path

from rpg.config import SamplingConfig
from rpg.generator.generator import Generator
from rpg.sampling.generate import generate_models
from rpg.storage.directories import remove_directory
from rpg.storage.locations import AnyPath


def timed_generation(
    generator: Generator,
    conditions: list[list[float]] | None,
    number: int,
    seed: int,
    directory: Path,
    sampling: SamplingConfig,
) -> tuple[list[AnyPath], float]:
    """The files of `number` networks a condition in `directory`, and the seconds until all were written."""
    # One generation comes first, because the first networks of a process wait for kernels to be loaded.
    first = None if conditions is None else conditions[:1]
    generate_models(generator, first, 1, seed, directory, sampling)
    remove_directory(directory)
    began = time.perf_counter()
    files = generate_models(generator, conditions, number, seed, directory, sampling)
    return files, time.perf_counter() - began
