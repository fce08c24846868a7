"""What measures the networks of a run: its task family, or its test command."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import torch

from ray_jobs.run_paths import RunPaths
from rpg.collection.collection import Collection
from rpg.collection.companions import Companions
from rpg.config import Config, JudgeConfig
from rpg.errors import RPGError, one_line
from rpg.evaluation.command_judge import MeasureOne
from rpg.evaluation.configured_judge import configured_judge, family_that_measures
from rpg.evaluation.judge import Candidate, Judge, Measurement
from rpg.storage.files import sha256
from rpg.tasks.families import load_family, uses_gpu

_NO_COMPANIONS = Companions()
_HERE = Path()


@dataclass(frozen=True)
class JudgeSettings:
    """All that a process needs to measure networks of a run."""

    tasks: str
    """The task family; empty if a command measures."""
    images: str
    evaluate: JudgeConfig
    use_gpu: bool
    """Whether networks are measured on a GPU."""

    @classmethod
    def of(cls, config: Config, collection: Collection | None) -> "JudgeSettings":
        """What measures the networks of a run: `evaluate.command`, or `tasks`, or the family that the
        collection names.

        Raises:
            RPGError: if none is named.
        """
        paths, evaluate = RunPaths.of(config), config.evaluate
        tasks = family_that_measures(paths.tasks, evaluate, collection)
        # Workers run in other directories.
        directory = evaluate.directory or str(Path.cwd())
        use_gpu = config.ray.use_gpu and (not tasks or uses_gpu(tasks))
        return cls(tasks, paths.images, dataclasses.replace(evaluate, directory=directory), use_gpu)

    def open(
        self,
        device: torch.device | None = None,
        companions: Companions = _NO_COMPANIONS,
        on_ray: bool = False,
    ) -> Judge:
        """The judge.

        Args:
            device: where networks of a task family run; None: the CPU.
            companions: what a command finds beside the weights of a network.
            on_ray: whether a command is run in Ray tasks, and not in threads of this process.

        Raises:
            RPGError: if there is no such family.
        """
        run_all = self._run_on_ray if on_ray else None
        return configured_judge(
            self.tasks, self.evaluate, self.images, device, companions, self.use_gpu, run_all
        )

    def _run_on_ray(self, measure: MeasureOne, networks: Sequence[Candidate]) -> list[Measurement]:
        run = _measure_one.options(num_gpus=int(self.use_gpu))
        shared = ray.put(measure)
        waiting = [run.remote(shared, network) for network in networks]
        return [_measured(ref, network) for ref, network in zip(waiting, networks, strict=True)]


def _measured(ref: Any, network: Candidate) -> Measurement:
    try:
        measurement: Measurement = ray.get(ref)
        return measurement
    except ray.exceptions.RayError as error:
        # The process may have been killed for its memory.
        return Measurement({}, None, f"{network.name}: evaluate.command: {one_line(error):.200}")


@ray.remote(num_cpus=1)
def _measure_one(measure: MeasureOne, network: Candidate) -> Measurement:
    return measure(network)


def family_name(config: Config) -> str:
    """The family that stage `collect` trains networks for.

    Raises:
        RPGError: if the config names none.
    """
    if name := RunPaths.of(config).tasks:
        return name
    raise RPGError(
        "tasks: expected a task family to train networks for, such as digits or my_tasks.py:MyTasks, or a "
        "collection that is there in collect.directory"
    )


def loaded_family(config: Config, device: torch.device | None = None) -> Any:
    """The family that stage `collect` trains networks for.

    Raises:
        RPGError: if there is none.
    """
    return load_family(family_name(config), RunPaths.of(config).images, device)


def family_inputs(config: Config) -> dict[str, str]:
    """What the output of a stage depends on that uses the task family: its name, and its file's digest."""
    file = RunPaths.of(config).tasks.rpartition(":")[0]
    return {"tasks": config.tasks, **_digests([file])}


def judge_inputs(config: Config) -> dict[str, str]:
    """What the output of a stage depends on that measures networks: the family or the command, and their
    files."""
    if not (command := config.evaluate.command):
        return family_inputs(config)
    try:
        words = shlex.split(command)
    except ValueError:
        words = []
    settings = dataclasses.asdict(config.evaluate)
    named = {key: str(settings[key]) for key in ("command", "metric", "higher_is_better")}
    return {**named, **_digests(words, Path(config.evaluate.directory))}


def _digests(files: Sequence[str], directory: Path = _HERE) -> dict[str, str]:
    found = {file: directory / file for file in files if file}
    return {file: sha256(path) for file, path in found.items() if path.is_file()}


def check_judge(config: Config) -> None:
    """Check the task family or the command that a config names, before any work is done.

    Raises:
        RPGError: if it cannot measure networks.
    """
    if config.tasks or config.evaluate.command:
        JudgeSettings.of(config, None).open().check()
