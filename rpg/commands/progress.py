"""Progress of a job on stderr: one bar, or a line now and then where stderr is no terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

_LINE_EVERY_SECONDS = 5.0

Update = Callable[[int, int, str], None]
"""Told what is done, what there is to do, and a note that is shown beside."""


@contextmanager
def models_progress() -> Iterator[Update]:
    """Progress counted in models."""
    with _progress("models", MofNCompleteColumn(), TimeRemainingColumn()) as update:
        yield update


@contextmanager
def bytes_progress() -> Iterator[Update]:
    """Progress counted in bytes."""
    with _progress("bytes", DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as update:
        yield update


@contextmanager
def _progress(unit: str, *columns: ProgressColumn) -> Iterator[Update]:
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield _lines(unit)
        return
    note_column = TextColumn("{task.fields[note]}")
    with Progress(BarColumn(bar_width=30), *columns, note_column, console=console) as bar:
        task = bar.add_task(unit, total=None, note="")

        def update(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield update


def _lines(unit: str) -> Update:
    last, shown = time.monotonic(), -1

    def update(done: int, total: int, note: str) -> None:
        nonlocal last, shown
        if done != shown and (done == total or time.monotonic() - last >= _LINE_EVERY_SECONDS):
            last, shown = time.monotonic(), done
            print(f"{unit}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    return update
