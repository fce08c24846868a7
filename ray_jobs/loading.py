"""Opening what earlier stages have made: the collection, the shards, the generator.

Several stages need each of them. A process reads a collection once; shards and generators behind a URI are
brought to the node's cache once.
"""

from functools import lru_cache
from pathlib import Path

from rpg.collection.collection import COLLECTION_FILE, Collection
from rpg.collection.shards import ShardedCollection
from rpg.config import RayConfig
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.storage.locations import AnyPath, identity
from rpg.storage.node_cache import local_copy


def load_collection(directory: AnyPath) -> Collection:
    """`Collection.load`, which reads the file again only where it has changed. The result is shared: callers
    must not change it.

    Raises:
        RPGError: if there is no collection, or it cannot be read.
    """
    return _loaded(directory, identity(directory / COLLECTION_FILE))


@lru_cache(maxsize=1)
def _loaded(directory: AnyPath, version: object) -> Collection:
    return Collection.load(directory)


def open_shards(directory: AnyPath, config: RayConfig) -> ShardedCollection:
    """Open shards to read tokens of; a fresh copy in the cache is compared with the manifest first."""
    local = local_copy(directory, *_cache(config), check=ShardedCollection.open)
    return ShardedCollection.open(local)


def load_generator(directory: AnyPath, config: RayConfig) -> Generator:
    """`Generator.from_pretrained` by way of the cache; errors name `directory`, not the copy."""
    local = local_copy(directory, *_cache(config))
    try:
        return Generator.from_pretrained(local)
    except RPGError as error:
        raise RPGError(str(error).replace(str(local), str(directory).rstrip("/"))) from error


def _cache(config: RayConfig) -> tuple[Path, int]:
    return Path(config.cache_directory), int(config.cache_gigabytes * 1e9)
