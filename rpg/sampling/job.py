"""A generation job: N models made from one generator, each written as soon as its last token is sampled."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from threading import Lock

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rpg.config import ConditionKind, SamplingConfig, TokenDtype
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.sampling.lanes import Lanes
from rpg.sampling.model_writer import ModelFile, remote_metadata
from rpg.sampling.noise import permutation_state
from rpg.sampling.placement import used_precision
from rpg.sampling.rows import Rows
from rpg.sampling.sampled import Sampled
from rpg.sampling.sampler import ModelRequest, PackedSampler, check_condition
from rpg.sampling.unfinished_files import UnfinishedFiles
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath, is_remote

_WAITING_BATCHES = 4
"""Batches sampled and not written yet."""
_WRITING_THREADS = 4
"""A GPU samples a network of ResNet-18's size in half of the time that one thread takes to write it."""
_LARGE_VALUES = 2**20
"""Networks of fewer values are written by one thread: what they take is Python's time."""


@dataclass(frozen=True)
class GenerationJob:
    """What is asked for: `number` models for each condition, or `number` in all where there are none.

    Model i belongs to condition i // number. It is determined by the generator, its condition, the seed, i
    and the sampling settings alone. `dtype` is the type that it is written in; None: the collection's own.

    Raises:
        RPGError: if `number` is less than 1.
    """

    conditions: list[list[float]] | None
    number: int
    seed: int
    sampling: SamplingConfig
    dtype: TokenDtype | None = None

    def __post_init__(self) -> None:
        if self.number < 1:
            raise RPGError(f"number: expected at least 1 model, got {self.number}")

    def __len__(self) -> int:
        """Models in the job."""
        return self.number * (1 if self.conditions is None else len(self.conditions))

    def condition_of(self, index: int) -> list[float] | None:
        """The condition that model `index` is asked for."""
        return None if self.conditions is None else self.conditions[index // self.number]

    def file_name(self, index: int) -> str:
        """The file name of model `index`."""
        return f"model_{index:06d}.safetensors"


class JobPlan:
    """How `generator` makes the models of `job`: checked as a whole, then asked model by model.

    Attributes:
        job: what is asked for.
        is_large: whether several threads write the models faster than one.
    """

    def __init__(self, generator: Generator, job: GenerationJob, digest: str | None = None) -> None:
        """`digest` is the generator's, where it is known already.

        Raises:
            RPGError: for a condition that does not fit the generator.
        """
        needed = generator.config.condition.size
        if generator.config.condition.kind == ConditionKind.vector and job.conditions is None:
            raise RPGError(f"condition: this generator needs one of {needed} values")
        self.job = job
        values = sum(spec.numel for spec in generator.layout.specs if spec.tokens)
        self.is_large = values >= _LARGE_VALUES
        self._generator = generator
        self._conditions = [check_condition(generator, condition) for condition in job.conditions or []]
        digest = digest or generator.digest()
        sampling = json.dumps(dataclasses.asdict(job.sampling))
        dtype = [] if job.dtype is None else [job.dtype]
        asked = json.dumps([digest, job.conditions, job.number, job.seed, sampling, *dtype])
        # `rpg.job` is a digest of all that was asked for.
        self._identity = {
            "format": "pt",
            "rpg.generator": digest,
            "rpg.job": hashlib.sha256(asked.encode()).hexdigest(),
            "rpg.sampling": sampling,
            # What was asked for comes out otherwise on another device.
            "rpg.precision": used_precision(generator, job.sampling),
        }
        if job.dtype is not None:
            self._identity["rpg.dtype"] = job.dtype
        self._dtype = None if job.dtype is None else getattr(torch, job.dtype)

    def request(self, index: int) -> ModelRequest:
        """What to sample for model `index`."""
        return ModelRequest(index, self._condition_row(index))

    def metadata(self, index: int) -> dict[str, str]:
        """Provenance, as model `index` carries it in its file."""
        return {
            **self._identity,
            "rpg.index": str(index),
            "rpg.seed": str(self.job.seed),
            "rpg.condition": json.dumps(self.job.condition_of(index)),
        }

    def file(self, index: int, out: AnyPath) -> ModelFile:
        """The file of model `index` in the directory `out`, to be written."""
        path = out / self.job.file_name(index)
        return ModelFile(path, self._generator.layout, self.metadata(index), self._dtype)

    def _condition_row(self, index: int) -> Tensor:
        config = self._generator.config.condition
        if config.kind == ConditionKind.permutation:
            return torch.tensor(permutation_state(self.job.seed, index, config.size))
        if not self._conditions:
            return torch.zeros(0)
        condition = self._conditions[index // self.job.number]
        if not config.states:
            return condition
        state = permutation_state(self.job.seed, index, config.states)
        return torch.cat([condition, condition.new_tensor([state])])


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
        The paths of all `indices`, in order.

    Raises:
        RPGError: for a condition that does not fit the generator, or if a file cannot be written.
    """
    plan = JobPlan(generator, job)
    layout, report = generator.layout, progress or (lambda finished, asked: None)
    finished = 0
    counting = Lock()

    def count() -> None:
        nonlocal finished
        with counting:
            finished += 1
            report(finished, len(indices))

    def missing() -> Iterator[ModelRequest]:
        for index in indices:
            if _metadata(out / job.file_name(index)) == plan.metadata(index):
                count()
            elif layout.tokens == 0:
                with plan.file(index, out):
                    pass
                count()
            else:
                yield plan.request(index)

    files = UnfinishedFiles(lambda index: plan.file(index, out))

    def write(index: int, token: int, run: slice, sampled: Sampled) -> None:
        if (file := files.write(index, token, run, sampled)) is not None:
            file.__exit__(None, None, None)
            count()

    report(finished, len(indices))
    sampler = PackedSampler(generator, job.sampling, job.seed)
    with ExitStack() as stack:
        # Writing ends before.
        stack.callback(files.clear)
        lanes = stack.enter_context(Lanes(_WRITING_THREADS if plan.is_large else 1, _WAITING_BATCHES))
        for rows, sampled in sampler.sample_to_write(missing()):
            lanes.do((index, partial(write, index, token, run, sampled)) for index, token, run in _runs(rows))
    return [out / job.file_name(index) for index in indices]


def _runs(rows: Rows) -> Iterator[tuple[int, int, slice]]:
    """The models of a batch, the first token of each in it, and where its rows are."""
    changes = torch.nonzero(rows.models[1:] != rows.models[:-1]).flatten() + 1
    for start, end in pairwise([0, *changes.tolist(), len(rows.models)]):
        yield int(rows.models[start]), int(rows.tokens[start]), slice(start, end)


def _metadata(path: AnyPath) -> dict[str, str] | None:
    if is_remote(path):
        with storage_errors_for(path):
            return remote_metadata(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] | None = file.metadata()
            return metadata
    except (OSError, SafetensorError):
        return None
