"""A replica's share of a job, on its way through the engine."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import astuple, dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple

from rpg.collection.checkpoint import read_checkpoint
from rpg.sampling.batch_sampler import BatchSampler
from rpg.sampling.job import JobPlan
from rpg.sampling.model_writer import ModelFile
from rpg.sampling.rows import Rows
from rpg.sampling.unfinished_files import UnfinishedFiles
from rpg.storage.locations import AnyPath
from serve.dispatch.records import Made

if TYPE_CHECKING:
    from rpg.evaluation.judge import Judge


class Segment(NamedTuple):
    """Consecutive tokens of one model in a batch."""

    work: "Work"
    model: int
    first_token: int
    rows: Rows


@dataclass(eq=False)
class Work:
    """Models of one job that a replica is to make.

    Attributes:
        job: the job's id.
        indices: the models, ascending.
        out: where their files go.
        report: called from any thread with every finished model, or once with what went wrong.
        judge: measures every finished model, where the job asked for it.
        dropped: set from any thread; nothing more is sampled or written then.
    """

    job: str
    priority: int
    plan: JobPlan
    indices: Sequence[int]
    out: AnyPath
    report: Callable[[Made | Exception], None]
    judge: "Judge | None" = None
    dropped: bool = False
    files: UnfinishedFiles = field(init=False)
    finishing: set["Future[None]"] = field(default_factory=set)
    _failing: Lock = field(default_factory=Lock)
    _waiting: deque[int] = field(init=False)
    _pieces: Iterator[Rows] | None = None
    _rest: Rows | None = None
    _index: int = 0
    _token: int = 0

    def __post_init__(self) -> None:
        self._waiting = deque(self.indices)
        self.files = UnfinishedFiles(lambda index: self.plan.file(index, self.out))

    @property
    def is_sampled(self) -> bool:
        """Whether all its tokens have been taken."""
        return not self._waiting and self._pieces is None

    def take(self, sampler: BatchSampler, count: int) -> Segment | None:
        """The next rows, at most `count`, all of one model; None if there are none."""
        while self._rest is None:
            if self._pieces is None:
                if not self._waiting:
                    return None
                self._index, self._token = self._waiting.popleft(), 0
                self._pieces = sampler.rows(self.plan.request(self._index), self.plan.job.seed)
            self._rest = next(self._pieces, None)
            if self._rest is None:
                self._pieces = None
        taken, rest = self._rest.split(count)
        segment = Segment(self, self._index, self._token, taken)
        self._token += len(taken.tokens)
        self._rest = rest if len(rest.tokens) else None
        if self._rest is None and self._token == sampler.generator.layout.tokens:
            self._pieces = None
        return segment

    def made(self, index: int, file: ModelFile, digest: str) -> None:
        """Report a model whose file is in place, and what it is worth where that was asked for."""
        accuracy = similarity = None
        if self.judge is not None:
            condition = self.plan.job.condition_of(index)
            assert condition is not None
            accuracy, similarity = astuple(self.judge.judge(read_checkpoint(file.path), condition))
        if not self.dropped:
            self.report(Made(index, digest, file.size, accuracy, similarity))

    def fail(self, error: Exception) -> None:
        """Give up, and say why; once."""
        with self._failing:
            first, self.dropped = not self.dropped, True
        if first:
            self.report(error)
