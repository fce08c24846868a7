"""Checkpoints of independent seeds: what a generator learns from them as they are, and aligned.

    python -m benchmarks.independent_seeds DIRECTORY [--steps 600]

trains ten-class networks of handwritten digits, each from initial weights and in an order of images of its
own, registers them, and aligns them (`rpg.tasks.aligned_collection`). It fits generators with the same
settings to both collections, with a permutation state for every checkpoint and without states, and prints the
table of `independent_seeds.md`. DIRECTORY keeps the networks.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rpg.collection.checkpoint import read_checkpoint, write_checkpoint
from rpg.collection.collection import Collection
from rpg.collection.manifest import write_manifest
from rpg.collection.register import register
from rpg.collection.shard_file import write_shard
from rpg.collection.shards import ShardedCollection
from rpg.collection.statistics import LayoutStatistics
from rpg.config import (
    ConditionConfig,
    ConditionKind,
    DenoiserConfig,
    GeneratorConfig,
    Normalisation,
    Precision,
    RecurrentConfig,
    SamplingConfig,
    TokenDtype,
    TrainConfig,
)
from rpg.evaluation.distance import nearest_checkpoint, spread
from rpg.evaluation.similarity import wrong_iou
from rpg.sampling.generate import generate_models
from rpg.seeds import derived_seed
from rpg.storage.directories import replacing_directory
from rpg.tasks.aligned_collection import align_collection
from rpg.tasks.binary_digits import train_side_by_side
from rpg.tasks.digits import DigitsNet, digits_images, digits_patches, digits_side_by_side
from rpg.tasks.families import Asked
from rpg.tasks.fine_tuning import ten_class_loss, unstacked
from rpg.training.fit import fit, new_trainer

FAMILY = f"{Path(__file__).absolute()}:TenDigits"
TOKEN_SIZE = 64
GENERATED = 20

StateDict = Mapping[str, Tensor]


class TenDigits:
    """The ten digits; all networks have one task."""

    def build_network(self) -> nn.Module:
        """A network of ten outputs."""
        return DigitsNet(outputs=10)

    def labels(self, condition: Asked, split: str) -> Tensor:
        """Each image's class."""
        return digits_images()[split].classes

    def predict(self, network: nn.Module, split: str) -> Tensor:
        """The classes that the network sees."""
        answers: Tensor = network(digits_images()[split].images).argmax(1)
        return answers

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """Training images and their classes."""
        train = digits_images()["train"]
        chosen = torch.randint(len(train.images), (size,), generator=random)
        return train.images[chosen], train.classes[chosen]

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor], condition: Asked) -> Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(outputs, batch[1])


def collect(directory: Path, networks: int, seed: int) -> None:
    """Train the networks side by side, and register them."""
    starts = []
    for number in range(networks):
        torch.manual_seed(derived_seed(seed, "independent start", number))
        starts.append(DigitsNet(outputs=10).state_dict())
    train = digits_images()["train"]
    trained = train_side_by_side(
        {name: torch.stack([start[name] for start in starts]) for name in starts[0]},
        digits_side_by_side,
        ten_class_loss,
        digits_patches(train.images),
        train.classes.expand(networks, -1),
        seeds=[derived_seed(seed, "independent order", number) for number in range(networks)],
        epochs=40,
        batch_size=32,
        learning_rate=3e-3,
    )
    with replacing_directory(directory) as temporary:
        assert isinstance(temporary, Path)
        for number, network in enumerate(unstacked(trained, list(starts[0]))):
            write_checkpoint(temporary / f"seed{number:03d}.safetensors", network, {"format": "pt"})
        register(temporary)


def generated(
    collection: Collection, kind: ConditionKind, steps: int, seed: int, scratch: Path
) -> tuple[list[dict[str, Tensor]], float]:
    """Networks of a generator that was fitted to a collection, and the seconds that fitting took."""
    entries = collection.splits["train"]
    state_dicts = [(entry.file, collection.read(entry)) for entry in entries]
    statistics = LayoutStatistics(state_dicts[0][1])
    for _, state_dict in state_dicts:
        statistics.update(state_dict)
    layout = statistics.layout(TOKEN_SIZE, Normalisation.residual)
    shards = scratch / "shards"
    info = write_shard(shards / "shard-0.arrow", layout, state_dicts, TokenDtype.float32)
    write_manifest(shards, layout, [info], entries, TokenDtype.float32)
    config = GeneratorConfig(
        recurrent=RecurrentConfig(width=128, depth=1, state_size=16, head_size=16),
        denoiser=DenoiserConfig(width=256, depth=3),
        condition=ConditionConfig(kind=kind),
    )
    train = TrainConfig(
        steps=steps, checkpoints_per_step=16, tokens_per_checkpoint=layout.tokens, save_every=steps,
        learning_rate=2e-3, precision=Precision.float32, ema_decay=0.99,
    )  # fmt: skip
    began = time.perf_counter()
    opened = ShardedCollection.open(shards)
    trainer = new_trainer(opened, config, train, seed, torch.device("cpu"))
    fit(trainer, opened, seed, lambda _: None, lambda *_: None)
    seconds = time.perf_counter() - began
    fitted = trainer.whole_average()
    assert fitted is not None
    files = generate_models(fitted, None, GENERATED, seed, scratch / "out", SamplingConfig())
    return [read_checkpoint(file) for file in files], seconds


@dataclass(frozen=True)
class Measured:
    """Networks on the test images, and where they lie among the originals."""

    accuracies: Tensor
    wrong: Tensor
    flat: Tensor

    @classmethod
    def of(cls, networks: Sequence[StateDict]) -> "Measured":
        """Run networks on the test images."""
        family, network = TenDigits(), DigitsNet(outputs=10).eval()
        rows = []
        for state_dict in networks:
            network.load_state_dict(state_dict)
            with torch.no_grad():
                rows.append(family.predict(network, "test") != family.labels(None, "test"))
        wrong = torch.stack(rows)
        # Files hold their tensors in orders of their own.
        names = sorted(networks[0])
        flat = torch.stack([torch.cat([each[n].flatten() for n in names]) for each in networks])
        return cls(1 - wrong.double().mean(1), wrong, flat)

    def alike(self) -> float:
        """Mean similarity of wrong answers (intersection over union) among the networks."""
        pairs = torch.from_numpy(wrong_iou(self.wrong.numpy(), self.wrong.numpy()))
        count = len(pairs)
        return float((pairs.sum() - pairs.diagonal().sum()) / (count * (count - 1)))


def line(name: str, networks: Measured, originals: Measured | None = None) -> str:
    """A line of the table; without originals to compare with, the networks are the originals."""
    of = originals or networks
    unit = spread(of.flat)
    if originals is None:
        distances = torch.cdist(networks.flat.double(), networks.flat.double())
        distances.fill_diagonal_(torch.inf)
        nearest, seeds = distances.min(1).values / unit, len(networks.flat)
    else:
        found = nearest_checkpoint(networks.flat, of.flat)
        nearest, seeds = found.distance / unit, len(found.index.unique())
    accuracy = networks.accuracies
    return (
        f"| {name} | {float(accuracy.mean()):.4f} | {float(accuracy.min()):.4f} | "
        f"{float(accuracy.mean() / of.accuracies.mean()):.3f} | {spread(networks.flat) / unit:.2f} | "
        f"{float(nearest.mean()):.2f} | {seeds} of {len(networks.flat)} | {networks.alike():.2f} |"
    )


def between(networks: Sequence[StateDict]) -> float:
    """Mean test accuracy half-way between each network and the next."""
    halves = [{name: (one[name] + other[name]) / 2 for name in one} for one, other in pairwise(networks)]
    return float(Measured.of(halves).accuracies.mean())


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--networks", type=int, default=60)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    plain, aligned = given.directory / "plain", given.directory / "aligned"
    if not plain.exists():
        collect(plain, given.networks, given.seed)
    if not aligned.exists():
        done = align_collection(Collection.load(plain), aligned, FAMILY)
        print(f"distance to the first network: {done.distance_before:.2f}, {done.distance_after:.2f} aligned")
    print("| networks | accuracy | least | of originals | spread | to the nearest original | seeds | alike |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, directory in (("as they are", plain), ("aligned", aligned)):
        collection = Collection.load(directory)
        networks = [collection.read(entry) for entry in collection.entries]
        originals = Measured.of(networks)
        print(line(f"originals, {name}", originals), flush=True)
        for kind in (ConditionKind.permutation, ConditionKind.none):
            scratch = given.directory / f"{directory.name}_{kind.value}"
            made, seconds = generated(collection, kind, given.steps, given.seed, scratch)
            states = "a state each" if kind == ConditionKind.permutation else "no states"
            print(line(f"generated, {name}, {states}", Measured.of(made), originals), flush=True)
            print(f"<!-- fitted in {seconds:.0f} s -->", flush=True)
        mean = {key: torch.stack([each[key] for each in networks]).mean(0) for key in networks[0]}
        print(
            f"<!-- {name}: half-way between two {between(networks):.4f}, "
            f"mean of all {float(Measured.of([mean]).accuracies):.4f} -->",
            flush=True,
        )


if __name__ == "__main__":
    main()
