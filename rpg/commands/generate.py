"""`rpg generate`: generate checkpoints on this machine."""

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from rpg.commands.arguments import (
    Commands,
    add_request_arguments,
    add_sampling_arguments,
    condition_values,
    path_or_uri,
)
from rpg.commands.progress import command_progress
from rpg.config import SamplingConfig, SamplingPrecision, Solver, validate_sampling
from rpg.errors import RPGError

if TYPE_CHECKING:
    from rpg.encoders import Encoder


def add_generate_command(commands: Commands) -> None:
    """Add `rpg generate` to the command's parsers."""
    parser = commands.add_parser("generate", help="generate checkpoints on this machine")
    parser.add_argument("generator", help="directory or URI of a generator")
    add_request_arguments(
        parser,
        condition_help="one digit a value, such as 0101010101, or numbers with commas, such as 0.5,2; with a "
        "minus in front write --condition=-1,0; may be given several times",
        description_help="in place of a condition, where the generator has a text encoder; may be given "
        "several times",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory or URI where the models go")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--clip", type=float, metavar="C", help="largest normalised value that a step may estimate; 0: any"
    )
    parser.add_argument(
        "--precision",
        choices=[precision.value for precision in SamplingPrecision],
        help="of products on a GPU; a CPU uses float32",
    )
    parser.add_argument(
        "--pack", action="store_true", help="write small models many into a tar, and print the tars' paths"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU, where there is one")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import torch

    from rpg.generator.generator import Generator
    from rpg.sampling.generate import generate_models

    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise RPGError("--device: cuda, but PyTorch finds no GPU")
    generator = Generator.from_pretrained(path_or_uri(options.generator))
    sampling = _sampling(options, generator.config.sampling)
    validate_sampling(sampling, generator.config, prefix="--")
    conditions = None
    if options.condition is not None:
        conditions = [condition_values(text, generator.config.condition.size) for text in options.condition]
    if options.description is not None:
        conditions = _conditions(generator.text_encoder(), options.description)
    generator.to(options.device or ("cuda" if has_gpu else "cpu"))
    with command_progress("generating") as display:
        paths = generate_models(
            generator, conditions, options.number, options.seed, path_or_uri(options.out), sampling,
            display.update, options.pack,
        )  # fmt: skip
    for path in paths:
        print(path)


def _conditions(encoder: "Encoder", descriptions: list[str]) -> list[list[float]]:
    """The conditions of descriptions; what a words model understands is printed to stderr."""
    from rpg.words.sentences import SentenceUnderstanding

    if not isinstance(encoder, SentenceUnderstanding):
        return [encoder.encode(text) for text in descriptions]
    understood = [encoder.understand(text) for text in descriptions]
    conditions = [each.condition(text) for each, text in zip(understood, descriptions, strict=True)]
    for each, text in zip(understood, descriptions, strict=True):
        print(f"{text!r}: {each.summary()}", file=sys.stderr)
    return conditions


def _sampling(options: argparse.Namespace, defaults: SamplingConfig) -> SamplingConfig:
    """The generator's settings of sampling, with those that were given on the command line in their place."""
    given = {key: getattr(options, key) for key in ("steps", "temperature", "guidance", "clip")}
    sampling = replace(defaults, **{key: value for key, value in given.items() if value is not None})
    if options.solver is not None:
        sampling = replace(sampling, solver=Solver(options.solver))
    if options.precision is not None:
        sampling = replace(sampling, precision=SamplingPrecision(options.precision))
    return sampling
