"""`rpg register`: make a collection of a folder of checkpoints."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from rpg.commands.arguments import Commands, path_or_uri
from rpg.commands.progress import command_progress


def add_register_command(commands: Commands) -> None:
    """Add `rpg register` to the command's parsers."""
    parser = commands.add_parser(
        "register",
        help="make a collection of a folder of checkpoints",
        description="Read every checkpoint of a folder, check that all are of one architecture, and write "
        "collection.json. What is decided here, such as --key or --ignore, holds for all later stages. When "
        "a folder is registered again, what is not given anew stays.",
    )
    parser.add_argument(
        "directory",
        help="folder or URI of checkpoints: .safetensors, PyTorch files of any ending, and directories of "
        "PEFT adapters and Hugging Face models",
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
        "--key",
        metavar="NAME",
        help="which mapping of tensors to take from files that hold several, such as state_dict_ema; keys in "
        "each other are joined by dots",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave out tensors whose names match, such as '*.position_ids'; may be repeated",
    )
    parser.add_argument(
        "--canonical-factors",
        action=argparse.BooleanOptionalAction,
        help="make factors of LoRA adapters depend on their products B A alone",
    )
    parser.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="SPLIT=PATTERN|FILE",
        help="put checkpoints into train, validation or heldout: by a pattern over their names "
        "(heldout='task_9*'), a list of names (validation=names.txt), or a CSV with the header file,split "
        "(splits.csv, or heldout=splits.csv for one split of it); may be repeated",
    )
    parser.add_argument(
        "--metrics",
        type=Path,
        metavar="FILE",
        help="metrics of the checkpoints: CSV (header file,...) or JSON ({file: {metric: number}})",
    )
    parser.add_argument(
        "--skip-bad", action="store_true", help="leave out checkpoints that cannot be used, and list them"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from rpg.collection.register import BadCheckpointsError, register

    notes: list[str] = []
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
                key=options.key,
                ignore=options.ignore,
                canonical_factors=options.canonical_factors,
                splits=options.split,
                metrics=options.metrics,
                note=notes.append,
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
        + "".join(
            f", {len(held)} {split}" for split, held in collection.splits.items() if split != "train" and held
        )
    )
    for line in notes:
        print(f"  {line}")


def _print_to_stderr(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)
