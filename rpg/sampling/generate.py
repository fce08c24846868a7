"""Making the models of a job in this process: an engine that is run until they are all written."""

from collections.abc import Callable, Sequence
from threading import Lock

from safetensors import SafetensorError, safe_open

from rpg.config import SamplingConfig
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.engine import Engine
from rpg.sampling.job import GenerationJob, JobPlan
from rpg.sampling.model_writer import remote_metadata
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
) -> list[AnyPath]:
    """Generate `number` models a condition into the directory `out`; see `run_job`."""
    job = GenerationJob(conditions, number, seed, sampling)
    return run_job(generator, job, range(len(job)), out, progress)


def run_job(
    generator: Generator,
    job: GenerationJob,
    indices: Sequence[int],
    out: AnyPath,
    progress: Callable[[int, int], None] | None = None,
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

    Returns:
        The paths of all `indices`, in order: of directories where the generator's collection consists of
        such, or else of files.

    Raises:
        RPGError: for a condition that does not fit the generator, or if a file cannot be written.
    """
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
        if _metadata(plan.weights_path(index, out)) != plan.provenance(index):
            return False
        if not plan.companions.are_in(plan.path(index, out)):
            return False
        count()
        return True

    def finish(models: Sequence[FinishedModel]) -> None:
        for _ in models:
            count()

    report(finished, len(indices))
    with Engine(generator) as engine:
        engine.submit(Request(plan, indices, out, finish, failures.append, is_there))
        while engine.step():
            pass
    if failures:
        raise failures[0]
    return [plan.path(index, out) for index in indices]


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
