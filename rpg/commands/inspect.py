"""`rpg inspect`: print the layout of a checkpoint, collection, shards or generator."""

import argparse
import json
import sys

from rich.console import Console

from rpg.commands.arguments import Commands, path_or_uri
from rpg.commands.progress import command_progress


def add_inspect_command(commands: Commands) -> None:
    """Add `rpg inspect` to the command's parsers."""
    parser = commands.add_parser(
        "inspect", help="print the layout of a checkpoint, collection, shards or generator"
    )
    parser.add_argument("path", help="file, directory or URI")
    parser.add_argument(
        "--token-size",
        type=int,
        metavar="N",
        help="for checkpoints and collections (default: 8192, or the largest tensor if that is smaller)",
    )
    parser.add_argument("--all", action="store_true", help="show every tensor of a long layout")
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument("--verify", action="store_true", help="check files against their SHA-256")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from rpg.commands.inspection import inspect

    with command_progress("verifying") as display:
        report = inspect(path_or_uri(options.path), options.token_size, options.verify, display.update)
    if options.json:
        print(json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        # A pipe or a file has no width that the table would have to fit into.
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(report.to_rich(show_all=options.all))
