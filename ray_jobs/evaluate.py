"""Stage `evaluate`: what networks are worth on held-out data, baselines, similarity, and the report.

python -m ray_jobs.evaluate CONFIG [key=value …]
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

import ray
import torch
from rich.console import Console

from ray_jobs.collect import BACKBONE_FILE
from ray_jobs.generate import GENERATE, JOB_FILE, chosen_conditions
from ray_jobs.judging import JudgeSettings, judge_inputs
from ray_jobs.loading import load_collection, load_generator, open_shards
from ray_jobs.resources import ResourceRequest, cpus_per_worker, node_resources
from ray_jobs.run_paths import RunPaths
from ray_jobs.stage import Stage, stage_main, stage_seconds, with_stages_before
from ray_jobs.training.checkpoints import HISTORY_FILE
from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.collection import Collection
from rpg.collection.shards import ShardedCollection
from rpg.commands.progress import console, stage_progress
from rpg.config import Config, Split, to_plain
from rpg.errors import RPGError
from rpg.evaluation.baseline_scores import BestOriginals, best_by_validation
from rpg.evaluation.baselines import evenly_spaced
from rpg.evaluation.judge import FamilyJudge, Judge
from rpg.evaluation.measure import Measured, measure
from rpg.evaluation.networks import (
    Condition,
    Network,
    TaskName,
    TrainingSet,
    condition_name,
)
from rpg.evaluation.results import Results, TaskSplit, versions
from rpg.generator.saving import CARD_FILE
from rpg.storage.files import read_json, write_text
from rpg.tasks.families import Metric, calling

_SLEEPING_THREADS = {"env_vars": {"OMP_WAIT_POLICY": "passive"}}
"""Threads of a task sleep while they wait for each other. Otherwise they keep their CPUs busy while waiting.
Where these CPUs have other work as well (two such tasks of 64 threads on one machine), 20 seconds of
evaluation then become five minutes."""
_MOST_ORIGINALS = 100
"""Originals that are measured where no condition tells them apart. Each is measured with noise added, too."""
_LINES_LEFT_OUT = 5
"""Reasons that are printed; all of them are in the report."""
REPORT_FILE = "report.json"
REPORT_PAGE = "report.html"


def run(config: Config) -> None:
    """Evaluate the generated networks and write the report."""
    # Every stage's job imports this module, and Matplotlib takes as long to import as all the rest of it.
    from rpg.evaluation.figures import to_svg
    from rpg.evaluation.report import build_report, figure_pairs, write_report
    from rpg.evaluation.tables import comparisons, model_card_table, terminal_table

    began = time.perf_counter()
    paths = RunPaths.of(config)
    with stage_progress("evaluate") as display:
        display.update(0, 2, f"networks on {_data_split(config)} data")
        settings = _judge_settings(config)
        # A command has a GPU in Ray tasks of its own.
        on_gpu = isinstance(settings, JudgeSettings) and settings.use_gpu and not settings.evaluate.command
        measured = _measure_on_gpu(config) if on_gpu else _measure(config, torch.device("cpu"))
        display.update(1, 2, "report")
        history = read_json(paths.fitted / HISTORY_FILE, "a training history")
        seconds = {stage.name: stage_seconds(stage, config) for stage in with_stages_before(GENERATE, config)}
        results = Results(
            name=config.name,
            seed=config.seed,
            config=to_plain(config),
            versions=versions(),
            timing_seconds={**seconds, "evaluate": time.perf_counter() - began},
            originals=measured.originals,
            generated=measured.generated,
            recomputed=measured.recomputed,
            noised=measured.noised,
            baselines=measured.baselines,
            sibling_distances=measured.sibling_distances,
            generated_distances=measured.generated_distances,
            noised_distances=measured.noised_distances,
            metric=measured.metric,
            other_metrics=measured.other_metrics,
            left_out=measured.left_out,
            losses=[(int(row["step"]), float(row["loss"])) for row in history],
        )
        report = build_report(results)
        write_report(paths.root, report, figure_pairs(results, to_svg))
        generator = load_generator(paths.generator, config.ray)
        write_text(paths.generator / CARD_FILE, generator.card(model_card_table(report)))
        display.update(2, 2)
    left_out = report["left_out"]
    for line in left_out[:_LINES_LEFT_OUT]:
        console.print(f"evaluate: left out: {line}", soft_wrap=True, markup=False)
    if (more := len(left_out) - _LINES_LEFT_OUT) > 0:
        console.print(f"evaluate: left out: {more} more, see {REPORT_FILE}", soft_wrap=True)
    terminal = Console()
    terminal.print(terminal_table(report))
    for line in comparisons(report):
        terminal.print(line, soft_wrap=True, markup=False, highlight=False)


def check(config: Config) -> None:
    """Refuse a task family or a test command that cannot measure networks. A run that names none is not
    refused: its report then holds what needs no test."""
    settings = _judge_settings(config)
    if isinstance(settings, JudgeSettings):
        settings.open().check()


def _judge_settings(config: Config) -> JudgeSettings | str:
    """What measures the networks, or the reason why nothing does."""
    paths, named = RunPaths.of(config), config.tasks or config.evaluate.command
    collection = load_collection(paths.collection) if config.collect.directory and not named else None
    try:
        return JudgeSettings.of(config, collection)
    except RPGError as error:
        if named or not config.collect.directory:
            raise
        return str(error)


def _measure_on_gpu(config: Config) -> Measured:
    """Run `_measure` as a Ray task where there is a GPU."""
    cpus = cpus_per_worker(node_resources(), 1, use_gpu=True)

    @ray.remote(num_cpus=cpus, num_gpus=1, runtime_env=_SLEEPING_THREADS)
    def measured() -> Measured:
        torch.set_num_threads(cpus)
        return _measure(config, torch.device("cuda"))

    result: Measured = ray.get(measured.remote())
    return result


def _measure(config: Config, device: torch.device) -> Measured:
    """Measure the run's networks for the report."""
    paths = RunPaths.of(config)
    collection, settings = load_collection(paths.collection), _judge_settings(config)
    shards = open_shards(paths.shards, config.ray)
    judge = None
    if isinstance(settings, JudgeSettings):
        judge = settings.open(device, shards.layout.companions, on_ray=True)
    originals, generated, left_out = _networks(config, collection, paths)
    if judge is None:
        left_out.append(f"scores: {settings}")
    measured = measure(
        shards.layout, _training_set(shards), originals, generated,
        judge=judge,
        data_split=_data_split(config),
        task_name=_task_names(judge, collection),
        noise_levels=config.evaluate.noise_levels,
        ridge_penalty=config.evaluate.ridge_penalty,
        seed=config.seed,
        best_originals=_best_originals(config, collection, originals),
        read_backbone=lambda: read_checkpoint(paths.collection / BACKBONE_FILE),
    )  # fmt: skip
    return dataclasses.replace(measured, left_out=[*left_out, *measured.left_out])


def _best_originals(config: Config, collection: Collection, originals: Sequence[Network]) -> BestOriginals:
    """Finds the best original of each unseen task, or, without conditions, the best training checkpoint."""
    known = {network.name: network for network in originals}
    unseen = {network.name for network in originals if network.split == TaskSplit.unseen}
    has_tasks = any(chosen_conditions(collection, config))

    def best(metric: Metric) -> list[Network]:
        if has_tasks:
            entries = [entry for entry in collection.entries if entry.file in unseen]
            return [known[entry.file] for entry in best_by_validation(entries, metric)]
        # All training checkpoints are of one task then, whatever their conditions.
        entries = [dataclasses.replace(entry, condition=None) for entry in collection.splits["train"]]
        return [
            known.get(entry.file) or Network(entry.file, None, TaskSplit.seen, collection.read_checked(entry))
            for entry in best_by_validation(entries, metric)
        ]

    return best


def _data_split(config: Config) -> str:
    """The data that networks are evaluated on.

    Networks for held-out tasks take the test data, by which nothing was chosen. Settings are chosen by
    networks for validation tasks, on the validation data.
    """
    return "test" if config.generate.split == Split.heldout else "validation"


def _task_names(judge: Judge | None, collection: Collection) -> TaskName:
    """How the report names tasks: as the family does, or by the description, or by the condition."""
    texts = collection.descriptions
    named = getattr(judge.family, "task_name", None) if isinstance(judge, FamilyJudge) else None

    known: dict[str, Condition] = {}

    def name(condition: Condition | None) -> str:
        if condition in texts:
            return texts[condition]
        if condition is None or named is None or judge is None:
            return condition_name(condition)
        try:
            with calling(judge.name, "task_name"):
                found = str(named(list(condition)))
        except RPGError:
            return condition_name(condition)
        # Networks of two tasks are never compared, whatever the family calls them.
        if known.setdefault(found, condition) != condition:
            return f"{found} ({condition_name(condition)})"
        return found

    return name


def _resources(config: Config) -> ResourceRequest | None:
    settings = _judge_settings(config)
    if not isinstance(settings, JudgeSettings) or not settings.use_gpu:
        return None
    return ResourceRequest("evaluation", 1, "ray.use_gpu=true", use_gpu=True)


def _networks(
    config: Config, collection: Collection, paths: RunPaths
) -> tuple[list[Network], list[Network], list[str]]:
    """Originals, generated networks, and a line for what is left out."""
    unseen, seen = chosen_conditions(collection, config)
    splits: dict[Condition | None, TaskSplit] = {tuple(condition): TaskSplit.seen for condition in seen}
    splits |= {tuple(condition): TaskSplit.unseen for condition in unseen}
    texts, entries, left_out = collection.descriptions, [], []
    if splits:
        for entry in collection.entries:
            condition = None if entry.condition is None else tuple(entry.condition)
            if condition in splits:
                entries.append((entry, condition, splits[condition]))
    else:
        # Without conditions there is one task, and all checkpoints are originals of it.
        of_split = {"train": TaskSplit.seen, config.generate.split: TaskSplit.unseen}
        known = [entry for entry in collection.entries if entry.split in of_split]
        entries = [(entry, None, of_split[entry.split]) for entry in evenly_spaced(known, _MOST_ORIGINALS)]
        if len(entries) < len(known):
            left_out.append(f"originals: {len(entries)} of {len(known)} were measured, evenly spaced")
    originals = [
        Network(
            entry.file,
            condition,
            split,
            collection.read_checked(entry),
            entry.description if condition is not None else None,
        )
        for entry, condition, split in entries
    ]
    job = read_json(paths.generated / JOB_FILE, "a generation job")
    generated = []
    for model in job["models"]:
        condition = None if model["condition"] is None else tuple(model["condition"])
        split = TaskSplit.seen if condition is None else TaskSplit(model["split"])
        state_dict = read_checkpoint(paths.generated / model["file"])
        generated.append(Network(model["file"], condition, split, state_dict, texts.get(condition or ())))
    return originals, generated, left_out


def _training_set(shards: ShardedCollection) -> TrainingSet:
    everything = range(shards.layout.tokens)
    mask = shards.layout.mask()
    # Filled row by row, because a list of rows beside the whole would need twice the memory.
    values = torch.empty(len(shards), int(mask.sum()))
    for i in range(len(shards)):
        values[i] = shards.read(i, everything)[mask]
    if shards.conditions is None:
        return TrainingSet(values, None)
    conditions: Sequence[Sequence[float]] = shards.conditions.tolist()
    return TrainingSet(values, [tuple(condition) for condition in conditions])


EVALUATE = Stage(
    name="evaluate",
    run=run,
    sections=("evaluate",),
    ignored=("evaluate.time_limit", "evaluate.directory"),
    further=judge_inputs,
    after=GENERATE,
    resources=_resources,
    check=check,
    outputs=lambda paths: [paths.root / REPORT_FILE, paths.root / REPORT_PAGE],
)

if __name__ == "__main__":
    sys.exit(stage_main("evaluate"))
