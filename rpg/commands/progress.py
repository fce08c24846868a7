"""Progress on stderr, of commands and of jobs: a bar, or a line now and then where stderr is no terminal."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

console = Console(stderr=True, highlight=False)
"""Where jobs print messages besides their progress."""


class ProgressDisplay:
    """Shows how far a task is."""

    def __init__(
        self,
        task: str,
        bar: Progress | None,
        is_transient: bool = False,
        *,
        seconds_between_lines: float = 5.0,
    ) -> None:
        """Show `task` on `bar`, or without one as lines.

        A transient display prints no lines, and shows its bar from the first update on: the task may turn
        out to have nothing to do.
        """
        self._task = task
        self._bar = bar
        self._is_transient = is_transient
        self._row = bar.add_task(task, total=None, note="", visible=not is_transient) if bar else None
        self._seconds_between_lines = seconds_between_lines
        self._last_line = time.monotonic()
        self._last_done = -1

    def update(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units are finished; `note` is shown beside."""
        if self._bar is not None and self._row is not None:
            self._bar.update(self._row, completed=done, total=total, note=note, visible=True)
        elif not self._is_transient:
            self._print(done, total, note)

    def _print(self, done: int, total: int, note: str) -> None:
        now = time.monotonic()
        is_due = done == total or now - self._last_line >= self._seconds_between_lines
        if done != self._last_done and is_due:
            self._last_line, self._last_done = now, done
            print(f"{self._task}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def command_progress(task: str) -> Iterator[ProgressDisplay]:
    """A bar for work on this machine, gone when the block ends; nothing where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _display(task, *columns, is_transient=True) as display:
        yield display


@contextmanager
def models_progress() -> Iterator[ProgressDisplay]:
    """Progress of a service's job, counted in models."""
    with _display("models", _bar(), MofNCompleteColumn(), TimeRemainingColumn(), _note()) as display:
        yield display


@contextmanager
def bytes_progress() -> Iterator[ProgressDisplay]:
    """Progress of a download, counted in bytes."""
    columns = (_bar(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), _note())
    with _display("bytes", *columns) as display:
        yield display


@contextmanager
def stage_progress(stage: str) -> Iterator[ProgressDisplay]:
    """Progress of a stage of the flow, counted in whatever the stage works on."""
    name = TextColumn("{task.description:>9}")
    with _display(stage, name, _bar(), MofNCompleteColumn(), TimeElapsedColumn(), _note()) as display:
        yield display


@contextmanager
def _display(task: str, *columns: ProgressColumn, is_transient: bool = False) -> Iterator[ProgressDisplay]:
    own_console = Console(stderr=True, highlight=False)
    if not own_console.is_terminal:
        yield ProgressDisplay(task, None, is_transient)
        return
    with Progress(*columns, console=own_console, transient=is_transient) as bar:
        yield ProgressDisplay(task, bar, is_transient)


def _bar() -> BarColumn:
    return BarColumn(bar_width=30)


def _note() -> TextColumn:
    return TextColumn("{task.fields[note]}")
