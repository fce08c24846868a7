"""What the tests of the node's cache do in processes of their own: quick to import in a fresh interpreter.

Fresh ones, since a forked process shares the event loop of its parent's connections to S3, and takes it along
when it ends.
"""

import time
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

from rpg.errors import RPGError
from rpg.storage.locations import location
from rpg.storage.node_cache import local_copy


def read(uri: str, cache: Path, limit: int) -> str:
    return local_copy(location(uri), cache, limit).read_text()


def tell(answer: Connection, uri: str, cache: Path, limit: int) -> None:
    """Send the content, or the text of the error."""
    try:
        answer.send(read(uri, cache, limit))
    except RPGError as error:
        answer.send(f"error: {error}")


def hold(answer: Connection, uri: str, cache: Path, limit: int) -> None:
    """Say so once the copy is in use, and keep it."""
    tell(answer, uri, cache, limit)
    time.sleep(60)


def bring(uri: str, cache: Path, limit: int) -> None:
    local_copy(location(uri), cache, limit)


def bring_with_others(ready: Connection, start: Event, uri: str, cache: Path, limit: int) -> None:
    """Say that the process is up, wait for the start, and send the sizes of the directory's files."""
    ready.send("ready")
    start.wait()
    path = local_copy(location(uri), cache, limit)
    ready.send({file.name: file.stat().st_size for file in path.iterdir()})
