"""Making the models of a job in this process: an engine that is run until they are all written."""

import re
from collections.abc import Callable, Sequence
from threading import Lock

from safetensors import SafetensorError, safe_open

from rpg.config import SamplingConfig
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.engine import Engine
from rpg.sampling.job import GenerationJob, JobPlan
from rpg.sampling.model_writer import remote_metadata
from rpg.sampling.pack import PACK_PATTERN
from rpg.sampling.request import FinishedModel, Request
from rpg.storage.below import path_below
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath, is_remote


def generate_models(
    generator: Generator,
    conditions: list[list[float]] | None,
    number: int,
    seed: int,
    out: AnyPath,
    sampling: SamplingConfig,
    progress: Callable[[int, int], None] | None = None,
    packed: bool = False,
) -> list[AnyPath]:
    """Generate `number` models a condition into the directory `out`; see `run_job`."""
    job = GenerationJob(conditions, number, seed, sampling)
    return run_job(generator, job, range(len(job)), out, progress, packed)


def run_job(
    generator: Generator,
    job: GenerationJob,
    indices: Sequence[int],
    out: AnyPath,
    progress: Callable[[int, int], None] | None = None,
    packed: bool = False,
) -> list[AnyPath]:
    """Make the models `indices` of `job` and write them into the directory `out`.

    Models that are there already, with the same provenance, are left as they are: a job that was interrupted
    goes on where it stopped, and makes the same files.

    Args:
        generator: on the device that it should run on.
        job: what is asked for.
        indices: ascending; all of `range(len(job))`, or one worker's share of it.
        out: directory or URI, made if need be.
        progress: called with (models finished, models asked for).
        packed: whether small models are written many into a file (`rpg.sampling.pack`); all are made then.

    Returns:
        The paths of all `indices`, in order: of directories where the generator's collection consists of
        such, or else of files, or of packs.

    Raises:
        RPGError: for a condition that does not fit the generator, if a file cannot be written, or if there
            are packs already that models would be added to.
    """
    if packed:
        _refuse_packs(out)
    plan = JobPlan(generator, job)
    report = progress or (lambda finished, asked: None)
    finished = 0
    counting = Lock()
    failures: list[BaseException] = []

    def count() -> None:
        nonlocal finished
        with counting:
            finished += 1
            report(finished, len(indices))

    def is_there(index: int) -> bool:
        if packed or _metadata(plan.weights_path(index, out)) != plan.provenance(index):
            return False
        if not plan.companions.are_in(plan.path(index, out)):
            return False
        count()
        return True

    paths: dict[int, AnyPath] = {}

    def finish(models: Sequence[FinishedModel]) -> None:
        for model in models:
            paths[model.model] = model.path
            count()

    report(finished, len(indices))
    with Engine(generator) as engine:
        engine.submit(Request(plan, indices, out, finish, failures.append, is_there, packed=packed))
        while engine.step():
            pass
    if failures:
        raise failures[0]
    if packed:
        return list(dict.fromkeys(paths[index] for index in indices))
    return [plan.path(index, out) for index in indices]


def _refuse_packs(out: AnyPath) -> None:
    with storage_errors_for(out):
        names = [path.name for path in out.iterdir()] if out.is_dir() else []
    for name in sorted(names):
        if re.fullmatch(PACK_PATTERN, name):
            raise RPGError(f"{out / name}: there are packed models already; choose another directory")


def _metadata(path: AnyPath) -> dict[str, str] | None:
    """The metadata of the weights at `path`; None if there are no whole ones."""
    if is_remote(path):
        with storage_errors_for(path):
            return remote_metadata(path)
    try:
        with path_below(path.parent, path.name) as local, safe_open(local, framework="pt") as file:
            metadata: dict[str, str] | None = file.metadata()
            return metadata
    except (RPGError, OSError, SafetensorError):
        return None
