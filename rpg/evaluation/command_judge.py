"""Networks measured by a command of the user's, such as `python test.py {checkpoint}`, in any language.

The command is run once for each network. Its last line of output is the result: a number, or a JSON object of
numbers by name. It is split into words before names are put in, and no shell reads it, so that names cannot
inject."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rpg.collection.checkpoint import write_checkpoint
from rpg.collection.companions import Companions
from rpg.errors import RPGError, one_line
from rpg.evaluation.judge import Candidate, Measurement, finite_metrics
from rpg.tasks.families import Asked, Metric

CHECKPOINT = "{checkpoint}"
_TAIL_BYTES = 65_536
"""Bytes at the end of a command's output in which its last line is looked for."""
_NUMBER = "score"
"""Name of the metric where the command prints a number and the config names none."""

_WATCHDOG = "read -r line; kill -s KILL 0"
"""Shell: waits for the end of its input, then ends its process group."""

_LONGEST_NAME = 40
"""Characters of a network's name in that of its temporary file: file systems allow 255 bytes."""

MeasureOne = Callable[[Candidate], Measurement]
RunAll = Callable[[MeasureOne, Sequence[Candidate]], list[Measurement]]


@dataclass(frozen=True)
class CommandJudge:
    """Measures networks by a command.

    Attributes:
        command: with `{checkpoint}` where the network's file or directory is to be named; `{condition}` (its
            numbers, with commas between, or its description) and `{split}` (`validation` or `test`) may be
            there too. `python` as the first word is the interpreter that runs the job.
        metric: the metric that counts; without a name it is the first one that the command prints.
        time_limit: seconds that the command may take for one network.
        companions: what lies beside the weights of a network that is a directory.
        directory: where the command runs, if the machine has it; empty: in the process's own directory.
        at_once: commands that run side by side in this process; 0: as many as there are CPUs.
        run_all: measures networks side by side elsewhere, in place of this process.
    """

    command: str
    metric: Metric
    time_limit: float = 600.0
    companions: Companions = field(default_factory=Companions)
    directory: str = ""
    at_once: int = 0
    run_all: RunAll | None = None

    @property
    def name(self) -> str:
        """The command."""
        return self.command

    @property
    def metrics(self) -> Sequence[Metric]:
        """The metric that counts."""
        return (self.metric,)

    def check(self) -> None:
        """Raise an `RPGError` if the command names no checkpoint, or there is no such program."""
        words = self._words()
        if not any(CHECKPOINT in word for word in words):
            raise RPGError(f"evaluate.command: expected {CHECKPOINT} in it, got '{self.command}'")
        program = str(Path(self.directory) / words[0]) if os.sep in words[0] else words[0]
        if shutil.which(program) is None:
            raise RPGError(f"evaluate.command: there is no program '{words[0]}'")

    def measure(self, networks: Sequence[Candidate], split: str) -> list[Measurement]:
        """Run the command for each network. How it failed is told in the network's measurement."""
        run = _MeasureOne(self._words(), self.metric, self.time_limit, self.companions, split, self.directory)
        if self.run_all is not None:
            return self.run_all(run, networks)
        with ThreadPoolExecutor(self.at_once or os.cpu_count() or 1) as pool:
            return list(pool.map(run, networks))

    def majority(self, asked: Asked, split: str) -> None:
        """None: a command does not say what is right."""

    def _words(self) -> list[str]:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise RPGError(f"evaluate.command: {error}: '{self.command}'") from error
        if not words:
            raise RPGError("evaluate.command: expected a program and its arguments, got nothing")
        return [sys.executable if words[0] == "python" else words[0], *words[1:]]


@dataclass(frozen=True)
class _MeasureOne:
    words: list[str]
    metric: Metric
    time_limit: float
    companions: Companions
    split: str
    directory: str

    def __call__(self, network: Candidate) -> Measurement:
        try:
            with tempfile.TemporaryDirectory() as directory:
                path = self._write(network, Path(directory))
                return Measurement(self._result(self._run(path, network.asked)))
        except (RPGError, OSError, ValueError) as error:
            return Measurement({}, None, f"{network.name}: {one_line(error)}")

    def _write(self, network: Candidate, directory: Path) -> Path:
        """Write the network as generated ones are written, in a file or a directory."""
        name = (
            Path(network.name).name.removesuffix(".safetensors").replace("\0", "")[:_LONGEST_NAME] or "model"
        )
        if not self.companions:
            path = directory / f"{name}.safetensors"
            write_checkpoint(path, network.state_dict, {"format": "pt"})
            return path
        path = directory / name
        path.mkdir()
        self.companions.write(path)
        write_checkpoint(path / self.companions.weights_name, network.state_dict, {"format": "pt"})
        return path

    def _run(self, path: Path, asked: Asked) -> str:
        """The end of what the command printed.

        Raises:
            RPGError: if it fails, or takes too long.
        """
        condition = asked if isinstance(asked, str) else ",".join(map(_exactly, asked or ()))
        values = {CHECKPOINT: str(path), "{condition}": condition, "{split}": self.split}
        words = [self.words[0], *(_filled(word, values) for word in self.words[1:])]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, _process_group() as group:
            try:
                # What the command itself has started is in the group as well.
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    cwd=self.directory if self.directory and Path(self.directory).is_dir() else None,
                    process_group=group,
                )
            except (OSError, ValueError) as error:
                raise RPGError(f"evaluate.command: '{words[0]}' cannot be run: {error}") from error
            try:
                status = process.wait(self.time_limit)
            except subprocess.TimeoutExpired:
                raise RPGError(
                    f"evaluate.command: took longer than evaluate.time_limit = {self.time_limit:g} s"
                ) from None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
                process.wait()
            if status:
                ended = f"exit status {status}" if status > 0 else f"signal {-status}"
                said = _last_line(_tail(err)) or _last_line(_tail(out))
                raise RPGError(f"evaluate.command: {ended}{f': {said:.300}' if said else ''}")
            return _tail(out)

    def _result(self, output: str) -> dict[str, float]:
        line = _last_line(output)
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, int | float) and not isinstance(found, bool) and found == found:
            return finite_metrics({self.metric.name or _NUMBER: found}, "evaluate.command")
        if not isinstance(found, dict) or not found:
            raise RPGError(
                "evaluate.command: expected a number or a JSON object of numbers as its last line, "
                f"got '{line:.80}'"
            )
        metrics = finite_metrics(found, "evaluate.command")
        counts = self.metric.name or next(iter(metrics))
        if counts not in metrics:
            raise RPGError(f"evaluate.command: metric '{counts}' is missing, got {', '.join(metrics):.80}")
        return {name: metrics[name] for name in dict.fromkeys([counts, *metrics])}


@contextmanager
def _process_group() -> Iterator[int]:
    """Yield a process group. All processes in it end after the block, or when this process is killed.

    Ray kills workers that use too much memory, and a user may kill the job. No code of the killed process
    runs then, so the group's first process waits for the end of a pipe that only this process has open.
    """
    watchdog = subprocess.Popen(
        ["/bin/sh", "-c", _WATCHDOG],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        process_group=0,
    )
    assert watchdog.stdin is not None
    try:
        yield watchdog.pid
    finally:
        # Until the first process has been waited for, no other group can get its number.
        with suppress(ProcessLookupError):
            os.killpg(watchdog.pid, signal.SIGKILL)
        watchdog.stdin.close()
        watchdog.wait()


def _exactly(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)


def _filled(word: str, values: dict[str, str]) -> str:
    """A word with its placeholders replaced, in one pass: what a value holds is not replaced again."""
    for key, value in values.items():
        if key in word:
            before, _, after = word.partition(key)
            return f"{_filled(before, values)}{value}{_filled(after, values)}"
    return word


def _tail(file: IO[bytes]) -> str:
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _TAIL_BYTES))
    return file.read().decode(errors="replace")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
