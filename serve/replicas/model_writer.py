"""Writing finished tokens beside sampling: one thread takes them in order, others finish the files.

Large models have several threads to write them, each model one: a file system lets one at a file at a time.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from functools import partial

from rpg.sampling.model_writer import ModelFile
from rpg.sampling.sampled import Sampled
from serve.replicas.work import Segment, Work

_WAITING_BATCHES = 4
"""Batches sampled and not written yet: more would fill the memory where a disk is slower than the sampler."""
_WRITING_THREADS = 4
_WRITING_SEGMENTS = 4
"""Of large models, handed to their threads and not written yet."""
_FINISHING_FILES = 64
_FINISHING_THREADS = 4
"""Syncing to disk and uploading wait rather than work."""

_log = logging.getLogger("ray.serve")


class ModelWriter:
    """Takes batches from the sampling thread and reports to each work what was made of them."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Sequence[Segment], Sampled] | Work | None] = queue.Queue(
            _WAITING_BATCHES
        )
        self._pool = ThreadPoolExecutor(_FINISHING_THREADS, thread_name_prefix="finish")
        self._room = threading.BoundedSemaphore(_FINISHING_FILES)
        self._lanes = [ThreadPoolExecutor(1, thread_name_prefix="write") for _ in range(_WRITING_THREADS)]
        self._segments = threading.BoundedSemaphore(_WRITING_SEGMENTS)
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)
        self._thread.start()

    def write(self, segments: Sequence[Segment], sampled: Sampled) -> None:
        """Write the tokens of `segments`; waits only where the disk lags behind."""
        self._queue.put((segments, sampled))

    def abandon(self, work: Work) -> None:
        """Clear away the unfinished files of a dropped work, after all that was written before."""
        self._queue.put(work)

    def close(self) -> None:
        """Write what was handed over, and end."""
        self._queue.put(None)
        self._thread.join()
        for pool in (*self._lanes, self._pool):
            pool.shutdown()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if isinstance(item, Work):
                    self._clear(item)
                else:
                    self._write(*item)
            except Exception:
                # One that nobody foresaw must not end the thread that all jobs depend on.
                _log.exception("while writing models")

    def _write(self, segments: Sequence[Segment], sampled: Sampled) -> None:
        row = 0
        for segment in segments:
            count = len(segment.rows.tokens)
            rows = slice(row, row + count)
            if segment.work.dropped:
                self._clear(segment.work)
            elif segment.work.plan.is_large:
                self._segments.acquire()
                # The same for a model that is handed out anew: its earlier file is finished first.
                lane = self._lanes[hash((segment.work.job, segment.model)) % _WRITING_THREADS]
                future = lane.submit(self._write_large, segment, sampled, rows)
                segment.work.finishing.add(future)
                future.add_done_callback(partial(self._done, segment.work, self._segments))
            else:
                try:
                    self._write_segment(segment, sampled, rows)
                except Exception as error:
                    segment.work.fail(error)
                    self._clear(segment.work)
            row += count

    def _write_large(self, segment: Segment, sampled: Sampled, rows: slice) -> None:
        work = segment.work
        if work.dropped:
            # More of this model may never come, and then nobody else would clear it away.
            if (error := work.files.discard(segment.model)) is not None:
                _log.warning("%s", error)
            return
        try:
            self._write_segment(segment, sampled, rows)
        except Exception as error:
            work.fail(error)

    def _write_segment(self, segment: Segment, sampled: Sampled, rows: slice) -> None:
        work, index = segment.work, segment.model
        if (file := work.files.write(index, segment.first_token, rows, sampled)) is not None:
            self._finish_soon(work, index, file)

    def _finish_soon(self, work: Work, index: int, file: ModelFile) -> None:
        self._room.acquire()
        future = self._pool.submit(self._finish, work, index, file)
        work.finishing.add(future)
        future.add_done_callback(partial(self._done, work, self._room))

    @staticmethod
    def _done(work: Work, room: threading.BoundedSemaphore, future: "Future[None]") -> None:
        work.finishing.discard(future)
        room.release()
        if (error := future.exception()) is not None:
            # One that nobody foresaw: the others have been told to the work.
            _log.error("while writing models", exc_info=error)

    def _finish(self, work: Work, index: int, file: ModelFile) -> None:
        try:
            with ExitStack() as stack:
                stack.push(file)
                digest = file.sha256()
            if not work.dropped:
                work.made(index, file, digest)
        except Exception as error:
            work.fail(error)

    def _clear(self, work: Work) -> None:
        """Close its files without putting them in place, and wait for those that are on their way there."""
        # What is being written may be finished next.
        while pending := list(work.finishing):
            wait(pending)
        for error in work.files.clear():
            _log.warning("%s", error)
