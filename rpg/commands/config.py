"""`rpg config`: print a preset with overrides applied."""

import argparse
from pathlib import Path

from omegaconf import OmegaConf

from rpg.commands.arguments import Commands
from rpg.config import load_config


def add_config_command(commands: Commands) -> None:
    """Add `rpg config` to the command's parsers."""
    parser = commands.add_parser("config", help="print a preset with overrides applied, checked and resolved")
    parser.add_argument("preset", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    config = load_config(options.preset, options.overrides)
    print(OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True), end="")
