"""Resuming stage `shard`: a run that is killed leaves what it has finished in `pending/` beside the shards.

The directory holds the layout, the digest of the plan that it was computed for, and the size and digest of
every finished shard.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress

from rpg import __version__
from rpg.collection.collection import Entry
from rpg.collection.companions import Companions
from rpg.collection.layout import Layout
from rpg.collection.reading import Reading
from rpg.config import ShardConfig
from rpg.errors import RPGError
from rpg.storage.directories import remove_directory
from rpg.storage.files import read_json, sha256, write_json
from rpg.storage.locations import AnyPath

PENDING = "pending"
PLAN_FILE = "plan.json"


class ShardResume:
    """The directory `pending/` of a directory of shards."""

    def __init__(self, shards: AnyPath) -> None:
        """Use the directory of `shards`, without reading or writing anything yet."""
        self.shards = shards
        self.directory = shards / PENDING

    def layout(self, plan: str) -> Layout | None:
        """The layout of a killed run, if it is complete and was computed for this plan."""
        try:
            if read_json(self.directory / PLAN_FILE, "a plan") != {"plan": plan}:
                return None
            return Layout.load(self.directory)
        except RPGError:
            return None

    def save_layout(self, layout: Layout, plan: str) -> None:
        """Keep a layout; the plan is written last, because it says that the layout is complete."""
        with suppress(FileNotFoundError):
            (self.directory / PLAN_FILE).unlink()
        layout.save(self.directory)
        write_json(self.directory / PLAN_FILE, {"plan": plan})

    def finished(self, file: str) -> tuple[int, str] | None:
        """Bytes and SHA-256 of a shard that a run has finished; None if it is missing or has changed."""
        try:
            record = read_json(self._record_path(file), "a finished shard's record")
            size, digest = (self.shards / file).stat().st_size, sha256(self.shards / file)
        except (RPGError, OSError):
            return None
        return (size, digest) if record == {"bytes": size, "sha256": digest} else None

    def record(self, file: str, size: int, digest: str) -> None:
        """Record that a shard is finished."""
        write_json(self._record_path(file), {"bytes": size, "sha256": digest})

    @property
    def scratch(self) -> AnyPath:
        """A directory for what is not worth resuming from."""
        return self.directory / "scratch"

    def clear(self) -> None:
        """Remove the directory."""
        remove_directory(self.directory)

    def _record_path(self, file: str) -> AnyPath:
        return self.directory / f"{file}.json"


def plan_digest(
    entries: Sequence[Entry], config: ShardConfig, reading: Reading, companions: Companions
) -> str:
    """SHA-256 of all that a layout depends on."""
    checkpoints = [(entry.file, entry.sha256) for entry in entries]
    inputs = [
        __version__, config.token_size, config.normalisation, config.cut, checkpoints, reading.to_json(),
        companions.digests,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
