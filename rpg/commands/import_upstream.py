"""`rpg import-upstream`: a generator of the published code becomes one of this library."""

import argparse

from rpg.commands.arguments import Commands, path_or_uri


def add_import_upstream_command(commands: Commands) -> None:
    """Add `rpg import-upstream` to the command's parsers."""
    parser = commands.add_parser(
        "import-upstream",
        help="take over a generator that the published code trained",
        description="Makes a generator of what the published code of Recurrent Diffusion saved "
        "(github.com/NUS-HPC-AI-Lab/Recurrent-Parameter-Generation). From the same noise it generates the "
        "same networks. Sizes, noise schedule and sampler are read from the checkpoint; `rpg generate` then "
        "takes the result. Neither file is executed.",
    )
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT.pth", help="the generator's weights, checkpoint/*.pth"
    )
    parser.add_argument(
        "structure",
        metavar="STRUCTURE.cache",
        help="dataset/*/structure.cache of its training set: names, shapes and normalisation of the networks",
    )
    parser.add_argument("out", metavar="OUT", help="directory or URI where the generator goes")
    parser.add_argument(
        "--states",
        action=argparse.BooleanOptionalAction,
        help="whether every network gets one of the permutation states, as the published code does unless "
        "told permutation_state=False (default: only without a class condition, as its scripts do)",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from rpg.generator.upstream import import_upstream

    generator = import_upstream(
        path_or_uri(options.checkpoint), path_or_uri(options.structure), options.states
    )
    generator.save_pretrained(path_or_uri(options.out))
    layout, condition = generator.layout, generator.config.condition
    print(
        f"{options.out}: a generator of networks of {len(layout.specs)} tensors in {layout.tokens} tokens of "
        f"{layout.token_size} values, condition {condition.kind} of {condition.size}"
    )
