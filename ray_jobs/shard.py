"""Stage `shard`: Ray Data turns a collection's training checkpoints into Arrow shards and their layout.

python -m ray_jobs.shard CONFIG [key=value …] [--refit]

A run that was killed goes on where it stopped. Checkpoints that have been added to the collection since the
last run are appended: the shards that are there, the layout and the centre stay.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_jobs.collect import COLLECT
from ray_jobs.loading import load_collection
from ray_jobs.run_paths import RunPaths
from ray_jobs.sharding.layout_pass import PART_LIMITS, compute_layout
from ray_jobs.sharding.resume import ShardResume, plan_digest
from ray_jobs.sharding.token_pass import Group, checkpoints_per_shard, cut_into_groups, write_shards
from ray_jobs.stage import Stage, stage_main
from rpg.collection.collection import Collection, Entry
from rpg.collection.companions import companions_of
from rpg.collection.layout import Layout
from rpg.collection.manifest import MANIFEST_FILE, ShardManifest, read_manifest, write_manifest
from rpg.collection.shard_file import ShardInfo
from rpg.collection.verified import damage, remember
from rpg.commands.progress import console, stage_progress
from rpg.config import Config, ShardConfig
from rpg.errors import RPGError
from rpg.storage.errors import storage_errors_for
from rpg.storage.locations import AnyPath


def run(config: Config, refit: bool = False, part_limits: tuple[int, int] = PART_LIMITS) -> None:
    """Turn training checkpoints into shards; new ones are appended to those that are there.

    Args:
        config: of the run.
        refit: compute layout, centre and all shards anew.
        part_limits: fewest and most checkpoints whose statistics one task gathers.
    """
    paths = RunPaths.of(config)
    collection = load_collection(paths.collection)
    entries = _training_entries(collection)
    directory, resume = paths.shards, ShardResume(paths.shards)
    companions = companions_of(collection.path(entries[0]), collection.root)
    plan = plan_digest(entries, config.shard, collection.reading, companions)
    layout = resume.layout(plan)
    # A killed run's layout takes precedence over the complete shards that were there before that run.
    earlier = None if refit or layout else _earlier_shards(directory, collection, entries, config.shard)
    with stage_progress("shard") as display:
        if earlier:
            layout, fitted, kept = earlier.layout, earlier.manifest.fitted, earlier.intact(directory)
            groups = earlier.groups(entries, config.shard)
        else:
            if layout is None:
                try:
                    layout = compute_layout(
                        collection, entries, config.shard, companions, display, resume.scratch, part_limits
                    )
                except BaseException:
                    # No layout, nothing to resume: shards that are there stay as they were.
                    resume.clear()
                    raise
                resume.save_layout(layout, plan)
            fitted, kept = len(entries), {}
            groups = cut_into_groups(entries, layout, config.shard)
        dtype = config.shard.dtype
        missing = [group for group in groups if _names(group) not in kept]
        written = write_shards(collection, missing, layout, dtype, resume, display)
    known = {**kept, **{shard.checkpoints: shard for shard in written}}
    shards = [known[_names(group)] for group in groups]
    write_manifest(directory, layout, shards, entries, dtype, fitted, collection.encoder, collection.reading)
    if isinstance(directory, Path):
        remember(directory, shards)
    resume.clear()
    _remove_other_shards(directory, shards)
    if earlier:
        new = len(entries) - len(earlier.manifest.names)
        news = f"{new} new checkpoint{'s' * (new > 1)} appended" if new else "no new checkpoints"
        console.print(
            f"shard: {news}; centre and scales stay those of the first {fitted}: --refit computes them anew",
            soft_wrap=True,
        )


def check(config: Config) -> None:
    """Refuse a collection of the user's that cannot be sharded; one that the run trains is not there yet."""
    if config.collect.directory:
        _training_entries(load_collection(RunPaths.of(config).collection))


def _training_entries(collection: Collection) -> list[Entry]:
    entries = [entry for entry in collection.entries if entry.split == "train"]
    if len(entries) < 2:
        raise RPGError(
            f"{collection.root}: a collection needs at least 2 training checkpoints, "
            f"this one has {len(entries)}"
        )
    return entries


@dataclass(frozen=True)
class _EarlierShards:
    """A complete set of shards that checkpoints can be appended to."""

    layout: Layout
    manifest: ShardManifest

    def intact(self, directory: AnyPath) -> dict[tuple[str, ...], ShardInfo]:
        """The shards that are undamaged, by the names of their checkpoints."""
        shards = self.manifest.shards
        damaged = damage(directory, shards)
        return {shard.checkpoints: shard for shard in shards if shard.file not in damaged}

    def groups(self, entries: Sequence[Entry], config: ShardConfig) -> list[Group]:
        """The groups of the shards that are there, followed by those of the new checkpoints."""
        by_name = {entry.file: entry for entry in entries}
        old = [Group([by_name[name] for name in shard.checkpoints]) for shard in self.manifest.shards]
        new = [entry for entry in entries if entry.file not in self.manifest.sha256]
        return old + cut_into_groups(new, self.layout, config, is_appended=True)


def _earlier_shards(
    directory: AnyPath, collection: Collection, entries: Sequence[Entry], config: ShardConfig
) -> _EarlierShards | None:
    """The shards that are there, if they are complete and were cut from `entries` with this config."""
    try:
        manifest, layout = read_manifest(directory), Layout.load(directory)
    except RPGError:
        return None
    digests = {entry.file: entry.sha256 for entry in entries}
    size = checkpoints_per_shard(layout, config) if layout.tokens else 0
    fits = (
        manifest.layout == layout.digest()
        and (layout.token_size, layout.normalisation) == (config.token_size, config.normalisation)
        and layout.cut == config.cut
        and manifest.dtype == config.dtype
        and manifest.reading == collection.reading
        and all(len(shard.checkpoints) <= size for shard in manifest.shards)
        and all(digests.get(name) == digest for name, digest in manifest.sha256.items())
        and companions_of(collection.root / manifest.names[0], collection.root) == layout.companions
    )
    return _EarlierShards(layout, manifest) if fits else None


def _names(group: Group) -> tuple[str, ...]:
    return tuple(entry.file for entry in group.entries)


def _remove_other_shards(directory: AnyPath, shards: Sequence[ShardInfo]) -> None:
    """Remove shards that the manifest does not name, and partial files that killed workers left."""
    named = {shard.file for shard in shards}
    with storage_errors_for(directory):
        files: list[AnyPath] = list(directory.iterdir())
    for path in files:
        is_shard = path.name.startswith("shard") and path.name.endswith(".arrow")
        is_partial = path.name.startswith(".shard") and path.name.endswith(".partial")
        if (is_shard and path.name not in named) or is_partial:
            with storage_errors_for(path, "cannot be removed"), suppress(FileNotFoundError):
                path.unlink()


SHARD = Stage(
    name="shard",
    run=run,
    sections=("shard",),
    after=COLLECT,
    outputs=lambda paths: [paths.shards / MANIFEST_FILE],
    check=check,
    distinguishing=lambda paths: paths.shards / MANIFEST_FILE,
)

if __name__ == "__main__":
    sys.exit(stage_main("shard", refit="compute layout, centre and all shards anew"))
