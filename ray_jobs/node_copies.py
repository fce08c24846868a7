"""What a node's processes read again and again, from the node's cache where it lies behind a URI."""

from pathlib import Path

from rpg.collection.shards import ShardedCollection
from rpg.config import RayConfig
from rpg.errors import RPGError
from rpg.generator.generator import Generator
from rpg.storage.locations import AnyPath
from rpg.storage.node_cache import local_copy


def open_shards(directory: AnyPath, config: RayConfig) -> ShardedCollection:
    """Open shards to read tokens of; a fresh copy is compared with the manifest first."""
    local = local_copy(directory, *_cache(config), check=ShardedCollection.open)
    return ShardedCollection.open(local)


def load_generator(directory: AnyPath, config: RayConfig) -> Generator:
    """`Generator.from_pretrained` by way of the cache."""
    local = local_copy(directory, *_cache(config))
    try:
        return Generator.from_pretrained(local)
    except RPGError as error:
        raise RPGError(str(error).replace(str(local), str(directory).rstrip("/"))) from error


def _cache(config: RayConfig) -> tuple[Path, int]:
    return Path(config.cache_directory), int(config.cache_gigabytes * 1e9)
