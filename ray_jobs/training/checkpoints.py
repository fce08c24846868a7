"""A checkpoint of Ray Train as a directory on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray.train

from rpg.storage.locations import AnyPath


@contextmanager
def opened(checkpoint: ray.train.Checkpoint, storage: AnyPath) -> Iterator[Path]:
    """Yield the directory of `checkpoint`, which is not to be written to.

    Ray would copy it here from any file system but its own local one, which `storage` is not written with
    (`ray_jobs.training.atomic_files`). A checkpoint has several times the size of its generator.
    """
    if isinstance(storage, Path):
        yield Path(checkpoint.path)
        return
    with checkpoint.as_directory() as directory:
        yield Path(directory)
