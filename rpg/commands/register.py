"""`rpg register`: make a collection of a folder of checkpoints."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from rpg.commands.arguments import Commands, path_or_uri
from rpg.commands.progress import command_progress


def add_register_command(commands: Commands) -> None:
    """Add `rpg register` to the command's parsers."""
    parser = commands.add_parser("register", help="make a collection of a folder of checkpoints")
    parser.add_argument(
        "directory", help="folder or URI of .safetensors, .pt, .pth or PEFT adapter directories"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--conditions", type=Path, metavar="FILE", help="CSV (header file,...) or JSON ({file: [numbers]})"
    )
    source.add_argument(
        "--descriptions",
        type=Path,
        metavar="FILE",
        help="CSV (header file,description) or JSON ({file: text}); their embeddings are the conditions",
    )
    parser.add_argument(
        "--pattern",
        help="template such as '{index}_acc{acc}_class{class:bits10}_{rest}', or a regular expression with "
        "named groups; kinds: bitsN, digits, value, state, metric (default: the published model's naming); "
        "beside --conditions or --descriptions one without a condition, such as '{rest}_seed{seed:state}'",
    )
    parser.add_argument(
        "--encoder",
        type=Path,
        metavar="DIR",
        help="text encoder that reads the descriptions: config.json, tokenizer.json and model.safetensors "
        "as transformers saves them; copied into the collection (default: the one that is there)",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out checkpoints that cannot be used, and list them"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from rpg.collection.register import BadCheckpointsError, register

    try:
        with command_progress("checking") as display:
            collection, skipped = register(
                path_or_uri(options.directory),
                options.conditions,
                options.pattern,
                options.skip_bad,
                display.update,
                options.descriptions,
                options.encoder,
            )
    except BadCheckpointsError as error:
        _print_to_stderr(error.problems)
        raise
    _print_to_stderr(f"skipped: {line}" for line in skipped)
    width = collection.condition_width
    print(
        f"{options.directory}: {len(collection)} checkpoints, "
        + ("no conditions" if width is None else f"conditions of width {width}")
        + (", from descriptions" if collection.encoder else "")
        + (f", {len(skipped)} skipped" if skipped else "")
    )


def _print_to_stderr(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)
