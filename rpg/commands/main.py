"""The `rpg` command: what can be done without Ray. The stages that need it are `python -m ray_jobs.…`."""

import argparse
import importlib.metadata
from collections.abc import Sequence

from rpg import __version__
from rpg.commands.align import add_align_command
from rpg.commands.ask import add_ask_command
from rpg.commands.config import add_config_command
from rpg.commands.exit_status import run_command
from rpg.commands.export import add_export_command
from rpg.commands.generate import add_generate_command
from rpg.commands.import_upstream import add_import_upstream_command
from rpg.commands.inspect import add_inspect_command
from rpg.commands.jobs import add_jobs_command
from rpg.commands.register import add_register_command

# Every command imports PyTorch within the function that runs it, so that `rpg --help` does not wait for it.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `rpg` with `arguments` (default: those of the process) and return its exit status."""
    options = _parser().parse_args(arguments)
    return run_command(lambda: options.run(options), "rpg")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rpg",
        description="Generates the weights of neural networks from collections of trained checkpoints.",
        epilog="Stages that run on Ray: python -m ray_jobs.{collect,shard,train,generate,evaluate,pipeline}",
    )
    parser.add_argument("--version", action="version", version=f"rpg {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_register_command(commands)
    add_inspect_command(commands)
    add_ask_command(commands)
    add_align_command(commands)
    add_generate_command(commands)
    add_export_command(commands)
    add_config_command(commands)
    add_import_upstream_command(commands)
    add_jobs_command(commands)
    # Packages that build on this one, such as the service, add their commands as entry points: the library
    # does not import them.
    for entry in importlib.metadata.entry_points(group="rpg.commands"):
        entry.load()(commands)
    return parser
