"""Time to quality on CIFAR-10's 1,022 binary tasks: accuracy against training seconds and sampling steps.

    python benchmarks/cifar10_time_to_quality.py --images DIRECTORY --output results

runs the presets `cifar10-binary` (which trains the collection) and `cifar10-binary-paper` (the same networks,
the published generator) from images to report on one GPU; then each of the two generators with fewer and more
sampling steps, and shorter trainings of each with a schedule of their own. Everything is measured on the
twenty held-out tasks and the test images; no setting is chosen here.

What is finished is kept below `--runs`, and a later call with the same presets goes on from there.
`--seconds` ends a call before the next piece once so many have passed. A generator that was trained too
little may make values that no network can have, which are refused: it has no accuracy. The last call writes
`results.json` and figures below `--output`, and prints a Markdown table. `--tiny` shows on a CPU that it
runs, and measures nothing.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from pieces import Pieces
from timed_generation import timed_generation

from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.shards import ShardedCollection
from rpg.config import Config, load_config, to_plain
from rpg.evaluation.figures import LIGHT, legend_below, style, to_png, to_svg
from rpg.evaluation.results import versions
from rpg.generator.generator import Generator
from rpg.sampling.model_writer import NotFiniteError
from rpg.storage.files import read_json, write_json
from rpg.tasks.class_subsets import HELD_OUT_TASKS, class_bits
from rpg.tasks.families import load_family
from rpg.training.fit import fit, new_trainer
from rpg.training.progress import TrainingProgress

ROOT = Path(__file__).parents[1]
FITTED = (
    "refine.steps=0", "generator.denoiser.width=3072", "generator.denoiser.depth=4",
    "generator.sampling.steps=8", "train.steps=4500", "train.save_every=4500",
)  # fmt: skip
"""The curve is that of fitting: how good networks are after so many seconds of it."""
KINDS = {"fast": "cifar10-binary", "paper": "cifar10-binary-paper"}
"""Presets by their denoiser."""
SAMPLING_STEPS = (50, 20, 8, 4, 2, 1)
TRAINING_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the preset's training steps; the whole is the preset's own run."""
TINY = (
    "ray.use_gpu=false", "ray.num_cpus=2", "collect.checkpoints_per_task=1", "collect.backbone_epochs=1",
    "collect.epochs=2", "collect.batch_size=8", "collect.models_per_batch=64", "shard.token_size=768",
    "generator.denoiser.width=32", "generator.denoiser.depth=1", "generator.denoiser.channels=[1,2,4,2,1]",
    "generator.recurrent.width=64", "generator.recurrent.depth=1", "generator.recurrent.state_size=8",
    "generator.condition.width=32", "generator.sampling.token_batch=512", "train.steps=32",
    "train.warmup_steps=1", "train.checkpoints_per_step=2", "train.tokens_per_checkpoint=4",
    "generate.models_per_task=1", "generate.seen_tasks=1", "evaluate.noise_levels=[0.02]",
)  # fmt: skip


MEASURED_PAPER = (
    "generator.condition.form=mlp", "generator.sampling.solver=ddim", "generator.sampling.eta=0",
    "generator.sampling.clip=5",
)  # fmt: skip
"""What the measured `paper` has that the published generator does not: its condition reaches all tokens, DDIM
begins with the noisiest timestep, and estimates are clipped, without which its variances became infinite."""


@dataclass(frozen=True)
class Session:
    """The settings of one call of this script."""

    images: str
    runs: Path
    output: Path
    ends: float
    """The time of `time.monotonic`, in seconds, from which on nothing more is begun."""
    tiny: bool

    def overrides(self, kind: str) -> list[str]:
        """The overrides of the preset of `kind`."""
        changes = [
            *(FITTED if kind == "fast" else ()),
            *(TINY if self.tiny else ()),
            f"collect.images={self.images}",
            f"output={self.runs / kind}",
        ]
        if kind != "fast":
            changes += MEASURED_PAPER
            changes.append(f"collect.directory={self.runs / 'fast' / 'collection'}")
        return changes

    def preset(self, kind: str) -> Path:
        """The preset's file."""
        return ROOT / "configs" / f"{KINDS[kind]}.yaml"

    def config(self, kind: str) -> Config:
        """The preset with the overrides."""
        return load_config(self.preset(kind), self.overrides(kind))

    def device(self) -> torch.device:
        """The device that generators train and sample on."""
        return torch.device("cpu" if self.tiny else "cuda")

    def pieces(self) -> Pieces:
        """The results so far; other settings have others."""
        settings = [to_plain(load_config(self.preset(kind), self.overrides(kind))) for kind in KINDS]
        return Pieces.of(self.runs, settings, self.ends)

    def piece(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure a piece unless an earlier call has (`Pieces.piece`)."""
        return self.pieces().piece(name, measure)


def run_preset(session: Session, kind: str) -> dict[str, Any]:
    """Run the whole pipeline, whose finished stages are kept; returns a few numbers of its report."""
    command = [sys.executable, "-m", "ray_jobs.pipeline", str(session.preset(kind)), *session.overrides(kind)]
    failed = subprocess.run(command, cwd=ROOT).returncode
    generator = session.runs / kind / "generator"
    if failed and not (generator.exists() and _makes_no_networks(session, kind)):
        sys.exit(f"{kind}: the pipeline failed; call again to go on with it")
    history = read_json(generator / "history.json", "a training history")
    trained = {"training_steps": history[-1]["step"], "training_seconds": history[-1]["seconds"]}
    if failed:
        return trained
    report = read_json(session.runs / kind / "report.json", "a report")
    accuracy = report["score"]
    return {
        "originals": accuracy["originals"]["mean"],
        "generated": accuracy["generated_unseen"]["mean"],
        "ratio": accuracy["ratio"],
        "baselines": {name: row["mean"] for name, row in accuracy["baselines"].items()},
        "similarity": report["similarity"]["unseen"],
        "distance": report["distance"],
        "timing_seconds": report["timing_seconds"],
        **trained,
    }


def _makes_no_networks(session: Session, kind: str) -> bool:
    """Whether the networks of the preset's generator are refused."""
    generator = Generator.from_pretrained(session.runs / kind / "generator").to(session.device())
    return accuracy_of(session, kind, generator)["accuracy"] is None


def accuracy_of(session: Session, kind: str, generator: Generator) -> dict[str, Any]:
    """Mean accuracy of networks generated for the held-out tasks (None if they are none), and the seconds
    until all were written."""
    config = session.config(kind)
    conditions = [class_bits(task) for task in HELD_OUT_TASKS]
    number, seed, sampling = config.generate.models_per_task, config.seed, generator.config.sampling
    with tempfile.TemporaryDirectory(dir=session.runs, prefix="generated-") as room:
        directory = Path(room) / "networks"
        try:
            files, seconds = timed_generation(generator, conditions, number, seed, directory, sampling)
        except NotFiniteError as error:
            return {"accuracy": None, "networks": 0, "generation_seconds": 0.0, "reason": str(error)}
        models = [read_checkpoint(file) for file in files]
        family = load_family(config.tasks, config.collect.images, session.device())
        asked = [condition for condition in conditions for _ in range(number)]
        right = torch.stack([family.labels(condition, "test") for condition in asked]).cpu()
        accuracy = (family.predict_many(models, "test") == right).float().mean()
    return {"accuracy": float(accuracy), "networks": len(models), "generation_seconds": seconds}


def with_sampling_steps(session: Session, kind: str, steps: int) -> dict[str, Any]:
    """The preset's generator, sampled in so many steps."""
    generator = Generator.from_pretrained(session.runs / kind / "generator").to(session.device())
    generator.config = replace(generator.config, sampling=replace(generator.config.sampling, steps=steps))
    return {"sampling_steps": steps, **accuracy_of(session, kind, generator)}


def trained_for(session: Session, kind: str, share: float) -> dict[str, Any]:
    """A generator trained as the preset says for a share of its steps, warm-up and cosine included."""
    config = session.config(kind)
    steps = max(1, round(config.train.steps * share))
    warmup = max(1, round(config.train.warmup_steps * share))
    train = replace(
        config.train, steps=steps, warmup_steps=warmup, save_every=steps, log_every=max(1, steps // 4)
    )
    shards = ShardedCollection.open(session.runs / kind / "shards")
    trainer = new_trainer(shards, config.generator, train, config.seed, session.device())
    last: list[TrainingProgress] = []
    fit(trainer, shards, config.seed, last.append, lambda trainer, progress: None)
    found = accuracy_of(session, kind, trainer.average)
    return {"training_steps": steps, "training_seconds": last[-1].seconds, "loss": last[-1].loss, **found}


def curve_figure(results: dict[str, Any]) -> Figure:
    """Accuracy against training seconds and against sampling steps."""
    originals, baselines = results["presets"]["fast"]["originals"], results["presets"]["fast"]["baselines"]
    colours = {"fast": (LIGHT.generated, "o", "-"), "paper": (LIGHT.originals, "s", "--")}
    with style(LIGHT):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        for kind, (colour, marker, line) in colours.items():
            for axes, key, rows in (
                (left, "training_seconds", results["training"][kind]),
                (right, "sampling_steps", results["sampling"][kind]),
            ):
                points = sorted((row[key], row["accuracy"]) for row in rows if row["accuracy"] is not None)
                x, y = [point[0] for point in points], [point[1] for point in points]
                axes.plot(x, y, color=colour, marker=marker, linestyle=line, label=kind)
        for axes, label in ((left, "training, seconds"), (right, "sampling steps")):
            axes.axhline(originals, color=LIGHT.ink, linewidth=1.2, label="originals")
            axes.axhline(
                0.99 * originals, color=LIGHT.ink, linewidth=1, linestyle=":", label="0.99 × originals"
            )
            axes.axhline(
                baselines["ridge_3"], color=LIGHT.baselines[0], linestyle="-.", label="ridge, order 3"
            )
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.set_xlabel(label)
        right.set_xticks(SAMPLING_STEPS, [str(steps) for steps in SAMPLING_STEPS])
        left.set_ylabel("accuracy, 20 held-out tasks")
        legend_below(figure, *left.get_legend_handles_labels(), columns=5)
        return figure


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    presets = results["presets"]
    originals = presets["fast"]["originals"]
    seconds = presets["fast"]["timing_seconds"]
    lines = [
        f"{results['machine']}; PyTorch {results['versions']['torch']}; collection trained in "
        f"{seconds['collect']:.0f} s, sharded in {seconds['shard']:.0f} s; originals {originals:.4f} on the "
        f"held-out tasks, "
        + ", ".join(f"{name} {value:.4f}" for name, value in presets["fast"]["baselines"].items()),
        "",
        "| denoiser | training steps | training s | sampling steps | accuracy | against originals | "
        "generation s, networks |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, found in presets.items():
        trained = [(row, "preset") for row in results["training"][kind]]
        sampled = [
            (
                {**row, **{key: found[key] for key in ("training_steps", "training_seconds")}},
                str(row["sampling_steps"]),
            )
            for row in results["sampling"][kind]
        ]
        for row, steps in [*trained, *sampled]:
            found_there = "no networks | – | –"
            if row["accuracy"] is not None:
                found_there = (
                    f"{row['accuracy']:.4f} | {row['accuracy'] / originals:.4f} | "
                    f"{row['generation_seconds']:.2f}, {row['networks']}"
                )
            lines.append(
                f"| {kind} | {row['training_steps']:,} | {row['training_seconds']:.1f} | {steps} | "
                f"{found_there} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, and print the table as Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="directory of train.parquet and test.parquet")
    parser.add_argument("--output", type=Path, required=True, help="directory for results.json and figures")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "cifar10_time_to_quality")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to see that it runs")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("needs a GPU; --tiny runs on a CPU")
    images = str(Path(given.images).absolute())
    session = Session(
        images, given.runs.absolute(), given.output.absolute(), time.monotonic() + given.seconds, given.tiny
    )
    shares = TRAINING_SHARES[-2:] if given.tiny else TRAINING_SHARES
    numbers = SAMPLING_STEPS[-2:] if given.tiny else SAMPLING_STEPS
    results: dict[str, Any] = {
        "machine": "CPU" if given.tiny else torch.cuda.get_device_name(),
        "versions": versions(),
        "presets": {},
        "sampling": {},
        "training": {},
    }
    for kind in KINDS:
        results["presets"][kind] = session.piece(f"{kind}-preset", lambda k=kind: run_preset(session, k))
        results["sampling"][kind] = [
            session.piece(
                f"{kind}-{n}-sampling-steps", lambda k=kind, n=n: with_sampling_steps(session, k, n)
            )
            for n in numbers
        ]
        results["training"][kind] = [
            session.piece(f"{kind}-{share:g}-of-training", lambda k=kind, s=share: trained_for(session, k, s))
            for share in shares
        ]
        # The preset's own run is the last point of the curve; sampled again, to be timed as the others are.
        whole = session.piece(f"{kind}-whole-training", lambda k=kind: whole_training(session, k))
        results["training"][kind].append(whole)
    write_json(given.output / "results.json", results)
    figure = curve_figure(results)
    for form, drawn in (("svg", to_svg(figure)), ("png", to_png(figure))):
        (given.output / f"time_to_quality.{form}").write_bytes(drawn)
    print(table(results))


def whole_training(session: Session, kind: str) -> dict[str, Any]:
    """The preset's generator, sampled as the preset says."""
    preset = read_json(session.pieces().directory / f"{kind}-preset.json", "a measurement")
    generator = Generator.from_pretrained(session.runs / kind / "generator").to(session.device())
    trained = {key: preset[key] for key in ("training_steps", "training_seconds")}
    return {**trained, **accuracy_of(session, kind, generator)}


if __name__ == "__main__":
    main()
