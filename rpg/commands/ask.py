"""`rpg ask`: from a description in words to a network, and what it answers."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rpg.commands.arguments import Commands, condition_text, condition_values, path_or_uri, seed
from rpg.errors import RPGError

if TYPE_CHECKING:
    from torch import Tensor

    from rpg.evaluation.answers import Answers
    from rpg.generator.generator import Generator
    from rpg.words.understood import Understood

PROJECT_GENERATOR = Path(__file__).parents[2] / "models" / "cifar10"
"""The generator that comes with the project."""
_SHOWN_OF_CLASS = 2
"""Images of each class in the terminal, so that all of them fit its height."""


def add_ask_command(commands: Commands) -> None:
    """Add `rpg ask` to the command's parsers."""
    parser = commands.add_parser(
        "ask",
        help="describe a classifier of images in words, and get it",
        description="Understand which of CIFAR-10's classes a description means, make a network that says "
        "yes to these and no to the others, and show what it answers.",
    )
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("description", nargs="?", help='such as "Select all things that can fly"; in English')
    asked.add_argument(
        "--condition",
        type=condition_text,
        metavar="C",
        help="the ten class bits in place of a description, such as 1010000000",
    )
    parser.add_argument(
        "--generator",
        default=str(PROJECT_GENERATOR),
        metavar="DIR",
        help="directory or URI of a generator of the task family cifar10 (default: the project's)",
    )
    parser.add_argument(
        "--llm",
        type=Path,
        metavar="PATH",
        help="have a causal language model understand the description: a directory that transformers loads, "
        "or a .gguf file",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("network.safetensors"),
        metavar="FILE",
        help="where the network goes (default: %(default)s)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="default: 0")
    parser.add_argument(
        "--image", type=Path, nargs="+", default=[], metavar="FILE", help="pictures for the network to answer"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the answers as a page of HTML")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import torch

    from rpg.evaluation.answers import answers, check_family, write_page
    from rpg.generator.generator import Generator
    from rpg.tasks.cifar10_samples import picture, samples
    from rpg.words.properties import CLASSES

    if options.out.suffix != ".safetensors":
        raise RPGError(f"--out: expected a name that ends with .safetensors, got {options.out}")
    # The networks are so small that several threads would wait for each other for longer than they compute.
    torch.set_num_threads(1)
    # A picture that cannot be read shall not cost a network.
    own = [picture(path) for path in options.image]
    generator = Generator.from_pretrained(path_or_uri(options.generator))
    shapes = {spec.name: tuple(spec.shape) for spec in generator.layout.specs}
    check_family(shapes, path_or_uri(options.generator))
    understood, condition = _asked(options, generator)
    network = _network(generator, condition, options)
    classes = [name for name, bit in zip(CLASSES, condition, strict=True) if bit]
    print(f"network: {options.out}, which says yes to {', '.join(classes)}")

    pixels, shown = samples()
    expected = torch.tensor(condition)[shown] > 0
    on_samples = answers(network, pixels, [CLASSES[i] for i in shown.tolist()], expected)
    groups = [("Test images", on_samples)]
    _show_samples(on_samples, len(shown) // len(CLASSES))
    if own:
        on_own = answers(network, torch.stack(own), [path.name for path in options.image])
        groups.insert(0, ("Your pictures", on_own))
        for name, says, chance in zip(options.image, on_own.says, on_own.chances.tolist(), strict=True):
            print(f"{name}: {says} ({chance:.2f})")
    if options.html is not None:
        asked = options.description or f"Condition {options.condition}"
        write_page(options.html, asked, understood, classes, groups)
        print(f"page: {options.html}")


def _asked(options: argparse.Namespace, generator: "Generator") -> tuple["Understood | None", list[float]]:
    """What was understood of a description, and the condition of the network.

    Raises:
        RPGError: if it is not sure what is meant, or the network would give every image the same answer.
    """
    from rpg.sampling.job import checked_condition
    from rpg.words.sentences import SentenceUnderstanding
    from rpg.words.understood import Understanding

    if options.condition is not None:
        if options.llm is not None:
            raise RPGError("--llm: understands descriptions; expected one in place of --condition")
        condition = condition_values(options.condition, generator.config.condition.size)
        checked_condition(generator.config.condition, condition)
        if set(condition) != {0.0, 1.0}:
            raise RPGError(
                f"--condition: expected 1 for some of the classes and 0 for others, got {options.condition}"
            )
        return None, condition
    understanding: Understanding
    if options.llm is not None:
        from rpg.words.language_model import LanguageModel

        understanding = LanguageModel(options.llm)
    else:
        encoder = generator.text_encoder()
        if not isinstance(encoder, SentenceUnderstanding):
            raise RPGError(
                f"{options.generator}: its text encoder names no classes; expected a generator with a words "
                "model, such as models/cifar10-words, or --llm"
            )
        understanding = encoder
    understood = understanding.understand(options.description)
    condition = understood.condition(options.description)
    print(f"understood: {understood.summary()}")
    return understood, condition


def _network(
    generator: "Generator", condition: list[float], options: argparse.Namespace
) -> dict[str, "Tensor"]:
    """Make the network, and write it to its place."""
    import tempfile

    from safetensors.torch import load_file

    from rpg.sampling.generate import generate_models
    from rpg.storage.files import copy_file

    with tempfile.TemporaryDirectory() as scratch:
        sampling = generator.config.sampling
        # Batches are filled up, and here there is one network alone.
        sampling = replace(sampling, token_batch=min(sampling.token_batch, generator.layout.tokens))
        [made] = generate_models(generator, [condition], 1, options.seed, Path(scratch), sampling)
        assert isinstance(made, Path)
        copy_file(made, options.out)
        network: dict[str, Tensor] = load_file(made)
    return network


def _show_samples(found: "Answers", of_class: int) -> None:
    """Print how many answers are right, and in a terminal some of the images."""
    from rich.console import Console

    from rpg.evaluation.answers import terminal_picture

    assert found.right is not None
    console = Console(highlight=False)
    if console.is_terminal and sys.stdout.encoding.lower().startswith("utf"):
        chosen = [i for i in range(len(found.names)) if i % of_class < _SHOWN_OF_CLASS]
        console.print(terminal_picture(found, chosen))
    print(f"accuracy: {found.accuracy:.3f} ({sum(found.right)} of {len(found.right)} test images)")
