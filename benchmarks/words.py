"""How many class bits of descriptions are understood: tables as Markdown.

    python benchmarks/words.py models/cifar10-words OTHER_SEED … --encoder all-MiniLM-L6-v2/

Each directory is one that `python -m rpg.words.make` wrote, with another seed. By validation properties
settings are chosen; test properties and the published descriptions are for the tables alone.
"""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from rpg.text_encoder import TextEncoder
from rpg.words.descriptions import DescriptionWriter
from rpg.words.embedding import embeddings
from rpg.words.measuring import Measured, described, measure, nearest_training
from rpg.words.properties import Part, class_names, out_of_scope, published
from rpg.words.sentences import SentenceUnderstanding

LISTS = 300
EDGES = (0.0, 0.5, 0.6, 0.7, 1.01)


def lists_of_classes() -> tuple[list[str], Tensor]:
    """Descriptions that name classes, of other seeds than those that were trained with."""
    writer = DescriptionWriter(class_names(), [])
    tasks = [tuple(int(bit) for bit in f"{1 + 53 * i % 1022:010b}") for i in range(LISTS)]
    texts = [writer.of_task(bits, 1, 10**6)[0] for bits in tasks]
    return texts, torch.tensor(tasks, dtype=torch.float32)


def published_bits() -> tuple[list[str], Tensor]:
    """The published descriptions and their bits."""
    return [text for text, _ in published()], torch.tensor(
        [bits for _, bits in published()], dtype=torch.float32
    )


def header(name: str, columns: Sequence[str]) -> str:
    """The first two lines of a table of numbers."""
    return f"| {name} | " + " | ".join(columns) + " |\n| --- |" + " ---: |" * len(columns)


def row(name: str, values: Sequence[float]) -> str:
    """A line of a table, with the mean of several values behind them."""
    mean = f" {sum(values) / len(values):.3f} |" if len(values) > 1 else ""
    return f"| {name} | " + " | ".join(f"{value:.3f}" for value in values) + f" |{mean}"


def calibration_error(measured: Measured) -> float:
    """The mean difference of probability and frequency, over ten bins of probability."""
    chances, bits = measured.classes.flatten(), measured.bits.flatten()
    bins = (chances * 10).long().clamp(max=9)
    return sum(
        float((bins == i).float().mean() * (chances[bins == i].mean() - bits[bins == i].mean()).abs())
        for i in bins.unique().tolist()
    )


def frozen(encoder: TextEncoder) -> list[str]:
    """Rows for the encoder as it is: cosine to "a photo of a CLASS", at the best threshold of each set."""
    anchors = embeddings(encoder, [f"a photo of a {each.names[0].singular}" for each in class_names()])
    found = []
    for name, (texts, bits) in {
        "test": described(Part.test)[:2],
        "published": published_bits(),
    }.items():
        scores = embeddings(encoder, texts) @ anchors.T
        best = max(
            float(((scores > bound) == (bits > 0.5)).float().mean()) for bound in scores.flatten().unique()
        )
        found.append(f"| {name} | {float((bits == 0).float().mean()):.3f} | {best:.3f} |")
    return found


def main() -> None:
    """Measure every directory, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument(
        "--validation", action="store_true", help="only what settings may be chosen by: validation properties"
    )
    options = parser.parse_args()
    parts = [Part.validation] if options.validation else [Part.validation, Part.test]
    understandings = [SentenceUnderstanding.load(each, options.encoder) for each in options.directories]
    plain = TextEncoder(options.encoder)
    columns = [each.name for each in options.directories] + ["mean"] * (len(understandings) > 1)
    print(header("share of right bits", columns))
    measured: dict[str, list[Measured]] = {}
    sets = {f"{part.value} properties": described(part) for part in parts}
    if not options.validation:
        sets |= {"published": (*published_bits(), None), "lists of classes": (*lists_of_classes(), None)}
    for name, (texts, bits, weights) in sets.items():
        measured[name] = [measure(each.encoder, each.head, texts, bits, weights) for each in understandings]
        print(row(name, [each.share_right() for each in measured[name]]))
        print(
            row(
                f"{name}, all ten right", [float((each.right == 1).float().mean()) for each in measured[name]]
            )
        )
        print(row(f"{name}, error of probabilities", [calibration_error(each) for each in measured[name]]))
    compared = [each for each in measured if "list" not in each]
    # The phrases that are learnt from are embedded once for all sets.
    nears = nearest_training([text for name in compared for text in measured[name][0].texts], plain)
    sizes = [len(measured[name][0].texts) for name in compared]
    for name, near in zip(compared, nears.split(sizes), strict=True):
        print(f"\n| {name}: cosine to the nearest training phrase | descriptions | right bits |")
        print("| --- | ---: | ---: |")
        for low, high in pairwise(EDGES):
            chosen = ((near >= low) & (near < high)).float()
            if chosen.any():
                shares = [each.share_right(chosen) for each in measured[name]]
                mean = sum(shares) / len(shares)
                print(f"| {low:.1f} to {min(high, 1):.1f} | {int(chosen.sum())} | {mean:.3f} |")
    print("\n" + header("sure", columns))
    for name, each in measured.items():
        bounds = [understanding.head.calibration.least_sureness for understanding in understandings]
        sure = [one.sureness >= bound for one, bound in zip(each, bounds, strict=True)]
        print(row(name, [float(one.float().mean()) for one in sure]))
        print(
            row(
                f"{name}, right bits of these",
                [one.share_right(s) for one, s in zip(each, sure, strict=True)],
            )
        )
    for part in parts:
        for kind, texts in out_of_scope(part).items():
            shares = [
                sum(each.understand(text).is_sure for text in texts) / len(texts) for each in understandings
            ]
            print(row(f"{part.value}: {kind} ({len(texts)})", shares))
    if not options.validation:
        print("\n| the encoder as it is | all no | best threshold |\n| --- | ---: | ---: |")
        print("\n".join(frozen(plain)))
        print("\n| published description | wrong bits | understood | sureness |\n| --- | --- | --- | ---: |")
        for text, bits in published():
            found = understandings[0].understand(text)
            wrong = sum(a != b for a, b in zip(found.bits, bits, strict=True))
            print(f"| {text} | {wrong or ''} | {', '.join(found.classes)} | {found.sureness:.2f} |")


if __name__ == "__main__":
    main()
