"""`rpg align`: the hidden units of a collection's networks in one order."""

import argparse

from rpg.commands.arguments import Commands, path_or_uri
from rpg.commands.progress import command_progress


def add_align_command(commands: Commands) -> None:
    """Add `rpg align` to the command's parsers."""
    parser = commands.add_parser(
        "align",
        help="put the hidden units of networks from different initial weights into one order",
        description="Write a collection whose networks compute the same as those of another, with their "
        "hidden units in the order in which their weights are most like those of the first training "
        "checkpoint (Git Re-Basin, arXiv 2209.04836). Networks that were trained from different initial "
        "weights have them in orders of their own, which a generator would otherwise have to learn.",
    )
    parser.add_argument("collection", help="directory or URI of a registered collection")
    parser.add_argument("out", help="directory or URI of the new collection")
    parser.add_argument(
        "--tasks",
        default="",
        metavar="FAMILY",
        help="task family whose network it is, as in a config (default: the one that the collection names)",
    )
    parser.add_argument("--images", default="", metavar="DIR", help="images, for families that take some")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from rpg.collection.collection import Collection
    from rpg.tasks.aligned_collection import align_collection
    from rpg.tasks.families import family_of

    collection, out = Collection.load(path_or_uri(options.collection)), path_or_uri(options.out)
    with command_progress("aligning") as display:
        family = options.tasks or family_of(collection)
        done = align_collection(collection, out, family, options.images, display.update)
    units = sum(group.size for group in done.groups)
    print(
        f"{out}: {done.checkpoints} checkpoints; {units} units in {len(done.groups)} groups; mean distance "
        f"to {done.reference} {done.distance_after:.4g}, before {done.distance_before:.4g}"
    )
