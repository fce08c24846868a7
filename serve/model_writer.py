"""Writing finished tokens beside sampling: one thread takes them in order, others finish the files."""

import logging
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

from rpg.errors import RPGError
from rpg.generation.model_file import ModelFile
from rpg.generation.sampled import Sampled
from serve.work import Segment, Work

_WAITING_BATCHES = 8
"""Batches sampled and not written yet: more would fill the memory where a disk is slower than the sampler."""
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
        self._pool.shutdown()

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
            if segment.work.dropped:
                self._clear(segment.work)
            else:
                try:
                    self._write_segment(segment, sampled, slice(row, row + count))
                except Exception as error:
                    segment.work.fail(error)
                    self._clear(segment.work)
            row += count

    def _write_segment(self, segment: Segment, sampled: Sampled, rows: slice) -> None:
        work, index = segment.work, segment.model
        with ExitStack() as stack:
            if segment.first_token == 0:
                file = stack.enter_context(work.plan.file(index, work.out))
            else:
                file = work.files.pop(index)
                stack.push(file)
            sampled.write(rows, file, segment.first_token)
            # All went well so far: it stays open.
            stack.pop_all()
        if segment.first_token + rows.stop - rows.start < file.layout.tokens:
            work.files[index] = file
        else:
            self._finish_soon(work, index, file)

    def _finish_soon(self, work: Work, index: int, file: ModelFile) -> None:
        self._room.acquire()
        future = self._pool.submit(self._finish, work, index, file)
        work.finishing.add(future)
        future.add_done_callback(lambda done: self._finished(work, done))

    def _finished(self, work: Work, future: "Future[None]") -> None:
        work.finishing.discard(future)
        self._room.release()

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
        dropped = RPGError("dropped")
        for file in work.files.values():
            try:
                file.__exit__(RPGError, dropped, None)
            except Exception as error:
                if error is not dropped:
                    _log.warning("%s", error)
        work.files.clear()
        wait(list(work.finishing))
