"""Progress of a stage on the terminal: one bar, or a line now and then where the output is no terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_LINE_EVERY_SECONDS = 5.0

console = Console(stderr=True, highlight=False)


class StageProgress:
    """Shows how far a stage is."""

    def __init__(self, stage: str, bar: Progress | None) -> None:
        self._stage = stage
        self._bar = bar
        self._task = bar.add_task(stage, total=None, note="") if bar else None
        self._last = time.monotonic()
        self._shown = -1

    def update(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units are finished; `note` is shown beside."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif done != self._shown and (done == total or time.monotonic() - self._last >= _LINE_EVERY_SECONDS):
            self._last = time.monotonic()
            self._shown = done
            print(f"{self._stage}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def stage_progress(stage: str) -> Iterator[StageProgress]:
    """A progress display for the duration of the block."""
    if not console.is_terminal:
        yield StageProgress(stage, None)
        return
    columns = (
        TextColumn("{task.description:>9}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield StageProgress(stage, bar)
