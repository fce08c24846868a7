"""ResNet-18 on CIFAR-10, unconditional: from images to ten generated networks and what they are worth.

    python benchmarks/cifar10_resnet18.py --images DIRECTORY --output results

trains one ResNet-18 (11.2 M parameters) and registers 50 checkpoints along its last epoch; runs the preset
`cifar10-resnet18` on them (shard, train, generate) on one GPU; times the generation of ten networks; and
evaluates all on the test images: accuracy, similarity, distance to the originals, each with its yardstick.

What is finished is kept below `--runs`, and a later call with the same settings goes on from there: the
network's training from its last saved epoch, the preset from its last finished stage. `--seconds` ends a
call before the next piece once so many have passed, with exit status 3. The last call writes `results.json`
and a figure below `--output`, and prints a Markdown table. `--tiny` shows on a CPU that it runs, and
measures nothing.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pieces import Pieces
from timed_generation import timed_generation
from torch import Tensor

from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.collection import Collection
from rpg.collection.shards import ShardedCollection
from rpg.config import Config, load_config, to_plain
from rpg.errors import RPGError
from rpg.evaluation.distance import nearest_checkpoint, spread
from rpg.evaluation.figures import Points, similarity_scatter, to_png, to_svg
from rpg.evaluation.networks import flatten
from rpg.evaluation.results import versions
from rpg.evaluation.similarity import BoolArray, Predictions, add_noise, similarity, wrong_iou
from rpg.generator.generator import Generator
from rpg.seeds import derived_seed
from rpg.storage.directories import remove_directory
from rpg.storage.files import read_json, write_json
from rpg.tasks.along_training import Recipe, collect_along_training
from rpg.tasks.cifar10_images import Images, check_files, cifar10_images
from rpg.tasks.cifar10_resnet18 import cifar10_resnet18, predicted_classes

ROOT = Path(__file__).parents[1]
PRESET = ROOT / "configs" / "cifar10-resnet18.yaml"
COMPARED_EVERY = 5
"""One original of so many is noised, and compared with the others."""
TINY_RECIPE = Recipe(epochs=2, batch_size=8, checkpoints=5, peak_learning_rate=0.02)
TINY_IMAGES = {"train": 80, "test": 50}
TINY = (
    "ray.use_gpu=false", "ray.num_cpus=2", "generator.denoiser.width=32", "generator.denoiser.depth=1",
    "generator.recurrent.width=64", "generator.recurrent.state_size=8",
    "generator.sampling.token_batch=512", "train.steps=4", "train.warmup_steps=1",
    "train.checkpoints_per_step=2", "train.tokens_per_checkpoint=4", "train.save_every=4",
    "generate.models_per_task=2", "evaluate.noise_levels=[0.02]",
)  # fmt: skip


@dataclass(frozen=True)
class Session:
    """The settings of one call of this script."""

    images: str
    runs: Path
    ends: float
    """The time of `time.monotonic`, in seconds, from which on nothing more is begun."""
    tiny: bool

    @property
    def recipe(self) -> Recipe:
        """The settings that the network is trained with."""
        return TINY_RECIPE if self.tiny else Recipe()

    @property
    def collection(self) -> Path:
        """The directory of the network's checkpoints."""
        return self.runs / "collection"

    @property
    def run(self) -> Path:
        """The output directory of the preset."""
        return self.runs / "run"

    @property
    def overrides(self) -> list[str]:
        """The overrides of the preset."""
        changes = TINY if self.tiny else ()
        return [*changes, f"collect.directory={self.collection}", f"output={self.run}"]

    @property
    def config(self) -> Config:
        """The preset with the overrides."""
        return load_config(PRESET, self.overrides)

    @property
    def device(self) -> torch.device:
        """The device of networks and generators."""
        return torch.device("cpu" if self.tiny else "cuda")

    def split(self, name: str) -> Images:
        """The images of a split, on the device."""
        images = cifar10_images(self.images, name)
        count = TINY_IMAGES[name] if self.tiny else len(images.classes)
        return Images(images.pixels[:count], images.classes[:count]).to(self.device)

    def network(self) -> torch.nn.Module:
        """A freshly initialised network on the device, the same at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.config.seed, "resnet18", 0))
            # Convolutions in bfloat16 are fastest with the channels last, as the images have them.
            return cifar10_resnet18().to(self.device, memory_format=torch.channels_last)


def collect(session: Session) -> dict[str, Any]:
    """Train the network, and keep and register its checkpoints."""
    began = time.perf_counter()
    recipe, network = session.recipe, session.network()

    def progress(epoch: int, loss: float) -> None:
        print(f"collection: epoch {epoch}/{recipe.epochs} loss {loss:.4f}", file=sys.stderr, flush=True)

    images = session.split("train")
    seconds = collect_along_training(
        network, images, recipe, session.config.seed, session.collection, progress
    )
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "training_images": len(images.classes),
        "recipe": asdict(recipe),
        "training_seconds": seconds,
        "seconds_of_last_call": time.perf_counter() - began,
    }


def fit(session: Session) -> dict[str, Any]:
    """Shard, train and generate as the preset says; finished stages are kept."""
    command = [sys.executable, "-m", "ray_jobs.pipeline", str(PRESET), *session.overrides]
    # The other process needs the GPU memory that this one keeps.
    torch.cuda.empty_cache()
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit("cifar10-resnet18: the pipeline failed; call again to go on with it")
    history = read_json(session.run / "generator" / "history.json", "a training history")
    generator = Generator.from_pretrained(session.run / "generator")
    return {
        "stage_seconds": {
            stage: read_json(session.run / "stages" / f"{stage}.json", "a stage's record")["seconds"]
            for stage in ("shard", "train", "generate")
        },
        "training_steps": history[-1]["step"],
        "training_seconds": history[-1]["seconds"],
        "loss": history[-1]["loss"],
        "generator_parameters": sum(parameter.numel() for parameter in generator.parameters()),
        "tokens": generator.layout.tokens,
    }


def time_generation(session: Session) -> dict[str, Any]:
    """Seconds from the request to the last written file, in one process that has generated before."""
    config = session.config
    generator = Generator.from_pretrained(session.run / "generator").to(session.device)
    directory, number = session.runs / "timed", config.generate.models_per_task
    sampling = config.generator.sampling
    _, seconds = timed_generation(generator, None, number, config.seed, directory, sampling)
    remove_directory(directory)
    return {"networks": number, "seconds": seconds, "sampling_steps": sampling.steps}


def evaluate(session: Session) -> dict[str, Any]:
    """Accuracy, similarity and distance of originals, generated networks, the centre and noised originals."""
    config, images = session.config, session.split("test")
    network = session.network()

    def wrong(networks: Iterable[Mapping[str, Tensor]]) -> BoolArray:
        rows = []
        for state_dict in networks:
            network.load_state_dict(state_dict, strict=True)
            rows.append((predicted_classes(network, images) != images.classes).cpu().numpy())
        return np.stack(rows)

    collection = Collection.load(session.collection)
    originals = [collection.read(entry) for entry in collection.entries]
    job = read_json(session.run / "generated" / "job.json", "a generation job")
    generated = [read_checkpoint(session.run / "generated" / model["file"]) for model in job["models"]]
    shards = ShardedCollection.open(session.run / "shards")
    centre = shards.layout.centre

    noise = torch.Generator().manual_seed(config.seed)
    of_originals, of_generated, of_centre = wrong(originals), wrong(generated), wrong([centre])
    of_noised = {
        level: wrong(add_noise(original, level, noise) for original in originals[::COMPARED_EVERY])
        for level in config.evaluate.noise_levels
    }
    found = similarity(
        _predictions(of_generated),
        _predictions(of_originals),
        {level: _predictions(rows) for level, rows in of_noised.items()},
    )
    return {
        "accuracy": {
            "originals": _accuracies(of_originals),
            "generated": _accuracies(of_generated),
            "centre": _accuracies(of_centre),
            **{f"noised {level:g}": _accuracies(rows) for level, rows in of_noised.items()},
        },
        "largest_similarity": {
            "originals": found.maxima_originals.tolist(),
            "generated": found.maxima_generated.tolist(),
            "centre": wrong_iou(of_centre, of_originals).max(1).tolist(),
            **{f"noised {level:g}": maxima.tolist() for level, maxima in found.maxima_noised.items()},
        },
        "mean_similarity": {
            "among originals": found.original_original,
            "among generated": found.generated_generated,
            "generated to originals": found.generated_original,
        },
        "distance": _distances(shards, generated),
        "test_images": len(images.classes),
    }


def _distances(
    shards: ShardedCollection, networks: list[dict[str, Tensor]]
) -> dict[str, dict[str, list[float]]]:
    """Distances to the nearest original and to the centre over all normalised values, in units of the spread.

    The spread is the root-mean-square distance of the originals to the centre.
    """
    layout = shards.layout
    mask, everything = layout.mask(), range(layout.tokens)
    originals = torch.stack([shards.read(i, everything)[mask] for i in range(len(shards))])
    generated = torch.stack([flatten(layout, network) for network in networks])
    centre = flatten(layout, layout.centre)[None]
    unit = spread(originals)
    chosen = torch.arange(len(originals)) % COMPARED_EVERY == 0
    to_nearest = {
        "originals": nearest_checkpoint(originals[chosen], originals[~chosen]),
        "generated": nearest_checkpoint(generated, originals),
        "centre": nearest_checkpoint(centre, originals),
    }
    to_centre = {
        name: [float(torch.dist(row, centre[0])) / unit for row in rows]
        for name, rows in (("originals", originals), ("generated", generated), ("centre", centre))
    }
    return {
        name: {"to_nearest_original": (nearest.distance / unit).tolist(), "to_centre": to_centre[name]}
        for name, nearest in to_nearest.items()
    }


def _predictions(wrong: BoolArray) -> Predictions:
    return Predictions(wrong, ["CIFAR-10"] * len(wrong))


def _accuracies(wrong: BoolArray) -> list[float]:
    accuracies: list[float] = (1 - wrong.mean(1)).tolist()
    return accuracies


def write_figure(evaluation: dict[str, Any], output: Path) -> None:
    """Largest similarity to an original against accuracy."""

    def points(name: str) -> Points:
        return Points(
            np.array(evaluation["largest_similarity"][name]), np.array(evaluation["accuracy"][name])
        )

    noised_points = {
        float(name.split()[1]): points(name) for name in evaluation["accuracy"] if name.startswith("noised ")
    }
    figure = similarity_scatter(points("originals"), points("generated"), noised_points, "accuracy")
    for form, drawn in (("svg", to_svg(figure)), ("png", to_png(figure))):
        (output / f"cifar10_resnet18.{form}").write_bytes(drawn)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    collection, fitted, generation, found = (
        results[name] for name in ("collection", "generator", "generation", "evaluation")
    )
    seconds = fitted["stage_seconds"]
    lines = [
        f"{results['machine']}; PyTorch {results['versions']['torch']}. Collection: "
        f"{collection['recipe']['epochs']} epochs in {collection['training_seconds']:.0f} s. Sharded in "
        f"{seconds['shard']:.0f} s. Generator of {fitted['generator_parameters'] / 1e6:.0f} M parameters: "
        f"{fitted['training_steps']:,} steps in {fitted['training_seconds']:.0f} s (stage: "
        f"{seconds['train']:.0f} s), loss {fitted['loss']:.4f}. {generation['networks']} networks generated "
        f"in {generation['seconds']:.2f} s.",
        "",
        "| networks | number | accuracy: mean | min | max | similarity to an original, largest: mean | max | "
        "distance to the nearest original: mean | min | to the centre: mean |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, accuracy in found["accuracy"].items():
        similar, distance = found["largest_similarity"][name], found["distance"].get(name)
        far = "– | – | –"
        if distance:
            nearest = distance["to_nearest_original"]
            far = f"{np.mean(nearest):.3f} | {min(nearest):.3f} | {np.mean(distance['to_centre']):.3f}"
        lines.append(
            f"| {name} | {len(accuracy)} | {np.mean(accuracy):.4f} | {min(accuracy):.4f} | "
            f"{max(accuracy):.4f} | {np.mean(similar):.3f} | {max(similar):.3f} | {far} |"
        )
    pairs = ", ".join(f"{name} {value:.3f}" for name, value in found["mean_similarity"].items())
    return "\n".join([*lines, "", f"Mean similarity over pairs: {pairs}."])


def main() -> None:
    """Make and measure what is missing, and print the table as Markdown."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help="directory of train.parquet and test.parquet")
    parser.add_argument(
        "--output", type=Path, required=True, help="directory for results.json and the figure"
    )
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "cifar10_resnet18")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    parser.add_argument("--tiny", action="store_true", help="on a CPU, to see that it runs")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("needs a GPU; --tiny runs on a CPU")
    # Sizes never change, so a search for the fastest kernels pays.
    torch.backends.cudnn.benchmark = True
    session = Session(
        str(Path(given.images).absolute()), given.runs.absolute(), began + given.seconds, given.tiny
    )
    check_files(session.images)
    # The collection can be used again after changes to the preset.
    source = {"recipe": asdict(session.recipe), "seed": session.config.seed, "images": session.images}
    results: dict[str, Any] = {
        "machine": "CPU" if given.tiny else torch.cuda.get_device_name(),
        "versions": versions(),
        "collection": Pieces.of(session.runs, source, session.ends).piece(
            "collection", lambda: collect(session)
        ),
    }
    settings = {**source, "config": to_plain(session.config)}
    pieces = Pieces.of(session.runs, settings, session.ends)
    for name, measure in (("generator", fit), ("generation", time_generation), ("evaluation", evaluate)):
        results[name] = pieces.piece(name, lambda measure=measure: measure(session))
    output = given.output.absolute()
    write_json(output / "results.json", results)
    write_figure(results["evaluation"], output)
    print(table(results))


if __name__ == "__main__":
    try:
        main()
    except RPGError as error:
        sys.exit(f"error: {error}")
