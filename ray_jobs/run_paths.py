"""Where the stages of a run keep their outputs."""

from dataclasses import dataclass

from rpg.config import Config
from rpg.storage.locations import AnyPath, location


@dataclass(frozen=True)
class RunPaths:
    """The directories of one run: all lie below `config.output`, except a collection of the user's."""

    root: AnyPath
    collection: AnyPath
    shards: AnyPath
    train: AnyPath
    generator: AnyPath
    generated: AnyPath
    images: str
    """Location of the task family's images (`rpg.tasks.families.task_family`); empty if none is given."""

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
        return cls(
            root, collection, root / "shards", root / "train", root / "generator", root / "generated", images
        )
