"""Threads that write sampled tokens into files while sampling goes on.

A model's tokens are written in order, by one thread, since a file system lets one thread at a time write into
a file. Large models are spread over several threads, because one thread may write them more slowly than a GPU
samples them. Files whose tokens are all written are finished by other threads, which mostly wait for the disk
or the network.

Small models are sampled whole, many in a batch, and what they take is Python's time. So one thread turns a
batch into what their files hold, and the others write these, several at a time.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import BoundedSemaphore

from rpg.errors import RPGError
from rpg.sampling import small_models
from rpg.sampling.batch_sampler import Sampled
from rpg.sampling.model_format import EncodedModels
from rpg.sampling.model_writer import ModelWriter
from rpg.sampling.request import FinishedModel, Models, Request, Segment

LARGE_VALUES = 2**20
"""Models of at least so many sampled values are large."""
_WAITING_BATCHES = 4
"""Batches that may be sampled and not written: more would fill the memory where a disk is slow."""
_WRITING_THREADS = 4
_FINISHING_THREADS = 4
_FINISHING_FILES = 64
"""Files that may be open with all their tokens written, and writes of small models that may wait."""

_log = logging.getLogger("rpg.sampling")


class OrderedWriters:
    """Writes the segments of sampled batches for their requests, each model's in the order of its tokens.

    What goes wrong is told to the request that it belongs to, and ends that request alone.
    """

    def __init__(self, large_values: int = LARGE_VALUES, at_start: Callable[[], None] | None = None) -> None:
        """Start no thread yet.

        Args:
            large_values: see `LARGE_VALUES`.
            at_start: called in every thread when it starts.
        """
        self._large_values = large_values
        self._writing = [ThreadPoolExecutor(1, "write", at_start) for _ in range(_WRITING_THREADS)]
        self._finishing = ThreadPoolExecutor(_FINISHING_THREADS, "finish", at_start)
        self._batches: deque[list[Future[None]]] = deque()
        self._files: set[Future[None]] = set()
        self._room_for_files = BoundedSemaphore(_FINISHING_FILES)
        self._is_cancelled = False

    def take_models(self, request: Request) -> bool:
        """Whether a request's models are to be sampled whole."""
        return request.plan.values < self._large_values and small_models.are_small(request)

    def write(self, segments: Sequence[Segment], models: Sequence[Models], sampled: Sampled) -> None:
        """Write the rows of `sampled`, which are those of `segments`, then those of `models`, in order.

        Waits where the disk lags behind.
        """
        futures: list[Future[None]] = []
        # Listed before it is filled, so that `close` waits for all of it even after an interrupt in the loop.
        self._batches.append(futures)
        row = 0
        for segment in segments:
            rows = slice(row, row + len(segment.rows.tokens))
            row = rows.stop
            segment.request.begin_action()
            try:
                futures.append(self._thread_of(segment).submit(self._write_segment, segment, sampled, rows))
            except BaseException:
                segment.request.end_action()
                raise
        if models:
            futures.append(self._submit_models(models, sampled, row))
        while self._batches and (
            len(self._batches) > _WAITING_BATCHES or all(future.done() for future in self._batches[0])
        ):
            wait(self._batches[0])
            self._batches.popleft()

    def finish(self, request: Request, model: int, file: ModelWriter) -> None:
        """Have a thread finish a file whose tokens are all written; waits where too many are unfinished."""
        try:
            self._in_finishing_thread(request, self._finish, request, model, file)
        except BaseException:
            file.discard()
            raise

    def close(self) -> None:
        """Write and finish what was handed over, and end the threads.

        If this is interrupted, what no thread has begun is left undone, and the interrupt is raised again.
        """
        try:
            self._wait()
        except BaseException:
            self._is_cancelled = True
            self._wait()
            raise
        finally:
            for pool in (*self._writing, self._finishing):
                pool.shutdown(wait=False)

    def _in_finishing_thread(self, request: Request, action: Callable[..., None], *arguments: object) -> None:
        self._room_for_files.acquire()
        request.begin_action()
        try:
            future = self._finishing.submit(action, *arguments)
        except BaseException:
            self._room_for_files.release()
            request.end_action()
            raise
        self._files.add(future)
        future.add_done_callback(self._finished)

    def _finished(self, future: "Future[None]") -> None:
        self._files.discard(future)
        self._room_for_files.release()

    def _wait(self) -> None:
        # `shutdown` would wait for the threads themselves, and where such a wait is interrupted, Python takes
        # threads that still run for ended (bpo-45274).
        for futures in list(self._batches):
            wait(futures)
        wait(list(self._files))

    def _thread_of(self, segment: Segment) -> ThreadPoolExecutor:
        if segment.request.plan.values < self._large_values:
            return self._writing[0]
        # Neighbouring models have different threads; a model has the same one in all requests of its job.
        return self._writing[(hash(segment.request.job) + segment.model) % _WRITING_THREADS]

    def _write_segment(self, segment: Segment, sampled: Sampled, rows: slice) -> None:
        request, model, first = segment.request, segment.model, segment.first_token
        with _acting(request):
            if self._is_cancelled:
                # More of its models will not be written, so its unfinished files are removed.
                request.drop()
            if request.dropped:
                return
            file = request.file_for(model, first)
            try:
                sampled.write(rows, file, first)
            except BaseException:
                file.discard()
                raise
            if first + rows.stop - rows.start == file.layout.tokens:
                self.finish(request, model, file)
            else:
                request.keep_file(model, file)

    def _finish(self, request: Request, model: int, file: ModelWriter) -> None:
        with _acting(request):
            if self._is_cancelled:
                file.discard()
                return
            try:
                digest = file.sha256() if request.hashed else None
                file.commit()
            except BaseException:
                file.discard()
                raise
            request.finish([FinishedModel(model, file.path, file.size, digest)])

    def _submit_models(self, models: Sequence[Models], sampled: Sampled, first_row: int) -> "Future[None]":
        for each in models:
            each.request.begin_action()
        try:
            return self._writing[0].submit(self._encode, models, sampled, first_row)
        except BaseException:
            for each in models:
                each.request.end_action()
            raise

    def _encode(self, models: Sequence[Models], sampled: Sampled, first_row: int) -> None:
        """Encode the small models of a batch, and have other threads write them."""
        with _acting(*(each.request for each in models)):
            if self._is_cancelled:
                for each in models:
                    each.request.drop()
                return
            for request, some, encoded in small_models.encode(models, sampled, first_row):
                self._in_finishing_thread(request, self._write_models, request, some, encoded)

    def _write_models(self, request: Request, models: Sequence[int], encoded: EncodedModels) -> None:
        with _acting(request):
            if self._is_cancelled:
                request.drop()
            if not request.dropped and (finished := small_models.write(request, models, encoded)):
                request.finish(finished)


@contextmanager
def _acting(*requests: Request) -> Iterator[None]:
    """Do something for requests; what goes wrong ends them, and no thread."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, RPGError | OSError):
            _log.error("while writing models", exc_info=error)
        for request in requests:
            request.fail_with(error)
    finally:
        for request in requests:
            request.end_action()
