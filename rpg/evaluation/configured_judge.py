"""Which judge a configuration means, in a run and in the service alike."""

import torch

from rpg.collection.collection import Collection
from rpg.collection.companions import Companions
from rpg.config import JudgeConfig
from rpg.errors import RPGError
from rpg.evaluation.command_judge import CommandJudge, RunAll
from rpg.evaluation.judge import FamilyJudge, Judge
from rpg.tasks.families import Metric, family_of

_NO_COMPANIONS = Companions()


def family_that_measures(tasks: str, config: JudgeConfig, collection: Collection | None) -> str:
    """The task family that measures: `tasks`, or the one that the collection names; empty if a command does.

    Raises:
        RPGError: if none is named.
    """
    if config.command:
        return ""
    if tasks:
        return tasks
    if collection is None:
        raise RPGError(
            "tasks: expected a task family, such as digits or my_tasks.py:MyTasks, or a collection of "
            "your own in collect.directory"
        )
    return family_of(collection)


def configured_judge(
    tasks: str,
    config: JudgeConfig,
    images: str = "",
    device: torch.device | None = None,
    companions: Companions = _NO_COMPANIONS,
    shares_gpu: bool = False,
    run_all: RunAll | None = None,
) -> Judge:
    """The judge that a configuration means: its command, or else the task family.

    Args:
        tasks: the family, as `family_that_measures` finds it; not used if there is a command.
        config: the command and its settings, and the time limit of both.
        images: directory or URI of images, for families that take them.
        device: where networks of a family run; None: the CPU.
        companions: what a command finds beside the weights of a network.
        shares_gpu: whether commands need the one GPU of this process, and so run one after the other.
        run_all: runs commands elsewhere (`CommandJudge`).

    Raises:
        RPGError: if there is no such family.
    """
    if not config.command:
        return FamilyJudge(tasks, images, device, config.time_limit)
    metric, at_once = Metric(config.metric, config.higher_is_better), 1 if shares_gpu else 0
    return CommandJudge(
        config.command, metric, config.time_limit, companions, config.directory, at_once, run_all
    )
