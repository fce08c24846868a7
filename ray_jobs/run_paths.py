"""Where the stages of a run keep their outputs."""

from dataclasses import dataclass

from rpg.config import Config
from rpg.storage.locations import AnyPath, location


@dataclass(frozen=True)
class RunPaths:
    """The directories of one run, all below `config.output` but a collection that was there before."""

    root: AnyPath
    collection: AnyPath
    shards: AnyPath
    train: AnyPath
    generator: AnyPath
    generated: AnyPath
    images: str
    """Of the task family, as `rpg.tasks.families.task_family` takes it; empty where none are named."""

    @classmethod
    def of(cls, config: Config) -> "RunPaths":
        """The paths of `config`: URIs, or absolute, since Ray's workers run elsewhere.

        Raises:
            RPGError: for a URI that cannot be one.
        """
        root = location(config.output)
        given = config.collect.directory
        collection = location(given) if given else root / "collection"
        images = str(location(config.collect.images)) if config.collect.images else ""
        return cls(
            root, collection, root / "shards", root / "train", root / "generator", root / "generated", images
        )
