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
from rpg.config import Config
from rpg.errors import RPGError, one_line
from rpg.evaluation.command_judge import CommandJudge, MeasureOne
from rpg.evaluation.judge import Candidate, FamilyJudge, Judge, Measurement
from rpg.storage.files import sha256
from rpg.tasks.families import Metric, family_of, load_family, uses_gpu

_NO_COMPANIONS = Companions()
_HERE = Path()


@dataclass(frozen=True)
class JudgeSettings:
    """All that a process needs to measure networks of a run."""

    tasks: str
    """The task family; empty if a command measures."""
    images: str
    command: str
    metric: Metric
    """The metric that counts, for a command."""
    time_limit: float
    directory: str
    """Where the command runs."""
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
        metric = Metric(evaluate.metric, evaluate.higher_is_better)
        if evaluate.command:
            directory = evaluate.directory or str(Path.cwd())
            return cls("", "", evaluate.command, metric, evaluate.time_limit, directory, config.ray.use_gpu)
        tasks = paths.tasks
        if not tasks:
            if collection is None:
                raise RPGError(
                    "tasks: expected a task family, such as digits or my_tasks.py:MyTasks, or a collection "
                    "of your own in collect.directory"
                )
            tasks = family_of(collection)
        return cls(
            tasks, paths.images, "", metric, evaluate.time_limit, "", config.ray.use_gpu and uses_gpu(tasks)
        )

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
        if self.command:
            run_all = self._run_on_ray if on_ray else None
            # Commands that share a GPU run one after the other.
            at_once = 1 if self.use_gpu else 0
            return CommandJudge(
                self.command, self.metric, self.time_limit, companions, self.directory, at_once, run_all
            )
        return FamilyJudge(self.tasks, self.images, device, self.time_limit)

    @property
    def higher_is_better(self) -> bool:
        """Whether the metric that counts is to be as high as possible."""
        if self.command:
            return self.metric.higher_is_better
        metrics = self.open().metrics
        return metrics[0].higher_is_better if metrics else True

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
