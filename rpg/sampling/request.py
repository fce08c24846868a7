"""What an engine is asked for: some models of one job."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from threading import Lock
from typing import NamedTuple

from rpg.sampling.batch_sampler import BatchSampler
from rpg.sampling.job import JobPlan
from rpg.sampling.model_writer import ModelWriter
from rpg.sampling.rows import Rows
from rpg.storage.locations import AnyPath


def _nowhere(index: int) -> bool:
    return False


class FinishedModel(NamedTuple):
    """A model that is in place."""

    model: int
    """Its index in the job."""
    path: AnyPath
    """Of its file or directory, or of the pack that it lies in."""
    size: int
    """Bytes of its weights."""
    sha256: str | None
    """Of its weights, where the request asks for that."""
    offset: int = 0
    """Where in `path` its weights begin."""


class SmallFile(NamedTuple):
    """The file of a small model, before it is written."""

    model: int
    name: str
    content: bytes


@dataclass(eq=False)
class Request:
    """Models of one job that an engine makes; their rows are taken by the engine's sampling thread.

    Attributes:
        plan: how the job's models are made.
        indices: the models, ascending.
        out: directory or URI where their files go.
        finish: called by a finishing thread with models that are in place.
        fail: called once, from any thread, with what went wrong; nothing more is made then.
        is_there: whether a model need not be made; asked when its turn comes.
        hashed: whether `finish` is to be told digests.
        packed: whether small models are written many into a file (`rpg.sampling.pack`). Only where no model
            is there.
        job: requests of one job take turns as one.
        priority: of the job; higher ones are sampled first.
        root: a directory that `out` lies below, outside of which nothing is written; None: `out` is trusted.
        dropped: nothing more is sampled or written.
    """

    plan: JobPlan
    indices: Sequence[int]
    out: AnyPath
    finish: Callable[[Sequence[FinishedModel]], None]
    fail: Callable[[BaseException], None]
    is_there: Callable[[int], bool] = _nowhere
    hashed: bool = False
    packed: bool = False
    job: str = ""
    priority: int = 0
    root: AnyPath | None = None
    dropped: bool = field(default=False, init=False)
    _left: Iterator[int] = field(init=False)
    _is_sampled: bool = field(default=False, init=False)
    _pieces: Iterator[Rows] | None = field(default=None, init=False)
    _rest: Rows | None = field(default=None, init=False)
    _index: int = field(default=0, init=False)
    _token: int = field(default=0, init=False)
    # Files between their first token and their last, and the actions of writing threads that may use them.
    _files: dict[int, ModelWriter] = field(default_factory=dict, init=False)
    _actions: int = field(default=0, init=False)
    # Files that wait for their pack, and how many more are to come.
    _waiting: list[SmallFile] = field(default_factory=list, init=False)
    _to_come: int = field(default=0, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)

    def __post_init__(self) -> None:
        self._left = iter(self.indices)
        self._to_come = len(self.indices)

    @property
    def wants_rows(self) -> bool:
        """Whether there may be tokens left to sample."""
        return not self.dropped and not self._is_sampled

    def missing(self) -> Iterator[int]:
        """The models that are left to make, each once."""
        for index in self._left:
            if not self.is_there(index):
                yield index

    def take_models(self, count: int) -> "Models | None":
        """The next models, at most `count`; None if there are none."""
        models = tuple(islice(self.missing(), count))
        self._is_sampled = len(models) < count
        return Models(self, models) if models else None

    def take(self, sampler: BatchSampler, count: int) -> "Segment | None":
        """The next rows, at most `count`, all of one model; None if there are none."""
        while self._rest is None:
            if self._pieces is None:
                index = next(self.missing(), None)
                if index is None:
                    self._is_sampled = True
                    return None
                self._index, self._token = index, 0
                self._pieces = sampler.rows(index, self.plan.condition_rows([index])[0], self.plan.job.seed)
            self._rest = next(self._pieces, None)
            if self._rest is None:
                self._pieces = None
        taken, rest = self._rest.split(count)
        segment = Segment(self, self._index, self._token, taken)
        self._token += len(taken.tokens)
        self._rest = rest if len(rest.tokens) else None
        return segment

    def drop(self) -> None:
        """Stop; files that are not finished are removed as soon as no thread is at them."""
        with self._lock:
            self.dropped = True
        self._remove_unfinished()

    def fail_with(self, error: BaseException) -> None:
        """Drop the request and report why, once."""
        with self._lock:
            is_first, self.dropped = not self.dropped, True
        if is_first:
            self.fail(error)
        self._remove_unfinished()

    def begin_action(self) -> None:
        """A writing thread is going to do something for this request."""
        with self._lock:
            self._actions += 1

    def end_action(self) -> None:
        """It has been done, or left undone."""
        with self._lock:
            self._actions -= 1
        self._remove_unfinished()

    def file_for(self, index: int, first_token: int) -> ModelWriter:
        """The file that tokens of a model from `first_token` on go into; a new one for the first token."""
        if first_token:
            return self._files.pop(index)
        return self.plan.open_file(index, self.out, self.root)

    def keep_file(self, index: int, file: ModelWriter) -> None:
        """More tokens of this model will come."""
        self._files[index] = file

    def gathered(self, files: Sequence[SmallFile], enough: int) -> list[SmallFile]:
        """Keep files for a pack; all that are kept once they have `enough` bytes or are the last, or none."""
        with self._lock:
            self._waiting += files
            self._to_come -= len(files)
            if self._to_come and sum(len(file.content) for file in self._waiting) < enough:
                return []
            waiting, self._waiting = self._waiting, []
            return waiting

    def _remove_unfinished(self) -> None:
        with self._lock:
            if self._actions or not self.dropped:
                return
            files, self._files = list(self._files.values()), {}
            self._waiting = []
        for file in files:
            file.discard()


class Segment(NamedTuple):
    """Consecutive tokens of one model in a batch."""

    request: Request
    model: int
    first_token: int
    rows: Rows


class Models(NamedTuple):
    """Small models, all of whose tokens are in a batch."""

    request: Request
    indices: tuple[int, ...]
