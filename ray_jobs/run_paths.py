"""Where the stages of a run keep their outputs."""

from dataclasses import dataclass
from pathlib import Path

from rpg.config import Config
from rpg.storage.locations import AnyPath, location


@dataclass(frozen=True)
class RunPaths:
    """The directories of one run: all lie below `config.output`, except a collection of the user's."""

    root: AnyPath
    collection: AnyPath
    shards: AnyPath
    train: AnyPath
    """Runs of Ray Train that fit."""
    fitted: AnyPath
    """The generator as stage `train` leaves it; where none is refined, it is `generator`."""
    refine: AnyPath
    """Runs of Ray Train that refine."""
    generator: AnyPath
    """The generator that networks are made with."""
    generated: AnyPath
    images: str
    """Location of the task family's images (`rpg.tasks.families.load_family`); empty if none is given."""
    encoder: AnyPath | None
    """Where the collection's encoder of descriptions comes from, if one is given."""
    tasks: str
    """The setting `tasks`, its file as an absolute path."""

    @classmethod
    def of(cls, config: Config) -> "RunPaths":
        """The paths of `config`: URIs, or absolute paths, because Ray's workers run in other directories.

        Raises:
            RPGError: for an invalid URI.
        """
        root = location(config.output)
        given = config.collect.directory
        collection = location(given) if given else root / "collection"
        images = str(location(config.collect.images)) if config.collect.images else ""
        encoder = location(config.collect.encoder) if config.collect.encoder else None
        file, separator, name = config.tasks.rpartition(":")
        tasks = f"{Path(file).absolute()}:{name}" if separator and file.endswith(".py") else config.tasks
        return cls(
            root=root,
            collection=collection,
            shards=root / "shards",
            train=root / "train",
            fitted=root / ("fitted" if config.refine.steps else "generator"),
            refine=root / "refine",
            generator=root / "generator",
            generated=root / "generated",
            images=images,
            encoder=encoder,
            tasks=tasks,
        )
