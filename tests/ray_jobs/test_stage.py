"""Whether a stage counts as done after its inputs have changed, or after it was stopped half way."""

import json
import shutil
import uuid
from dataclasses import replace

import pytest

from ray_jobs.generate import GENERATE
from ray_jobs.shard import SHARD
from ray_jobs.stage import Stage, is_done, run_stage
from ray_jobs.train import TRAIN
from rpg.config import Config, load_config
from rpg.storage.locations import location


@pytest.fixture
def copied(small_run, tmp_path):
    """The small run in another place, and its config."""
    shutil.copytree(small_run.root, tmp_path / "copy")
    preset, *changes = small_run.arguments
    return tmp_path / "copy", load_config(location(preset), [*changes, f"output={tmp_path / 'copy'}"])


@pytest.mark.slow
def test_networks_of_another_generator_are_made_anew(copied):
    root, config = copied
    assert is_done(TRAIN, config)
    assert is_done(GENERATE, config)
    history = json.loads((root / "generator" / "history.json").read_text())
    history[-1]["seconds"] += 0.1
    (root / "generator" / "history.json").write_text(json.dumps(history))
    assert is_done(TRAIN, config)
    assert not is_done(GENERATE, config)


@pytest.mark.slow
def test_shards_of_other_checkpoints_are_made_anew(copied):
    root, config = copied
    path = root / "collection" / "collection.json"
    content = json.loads(path.read_text())
    content["entries"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    assert not is_done(SHARD, config)
    assert not is_done(TRAIN, config)


@pytest.mark.slow
def test_a_collection_that_changes_while_it_is_cut_is_cut_again(copied):
    root, config = copied
    path = root / "collection" / "collection.json"

    def cut(config: Config) -> None:
        content = json.loads(path.read_text())
        content["entries"][0]["split"] = "heldout"
        path.write_text(json.dumps(content))

    run_stage(replace(SHARD, run=cut), config)
    assert not is_done(SHARD, config)


@pytest.mark.parametrize("place", ["memory://", "local"])
@pytest.mark.parametrize("written", [0, 1])
def test_a_stopped_stage_is_done_only_if_it_changed_nothing(place, written, tmp_path):
    root = f"memory://{uuid.uuid4().hex}" if place == "memory://" else str(tmp_path)
    config = replace(Config(), output=root)
    directory = location(root) / "generated"

    def whole(config: Config) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "job.json"):
            (directory / name).write_text("first")

    def stopped(config: Config) -> None:
        for name in ("model.safetensors", "job.json")[:written]:
            # The text has another length, because two writes may have the same time.
            (directory / name).write_text("another")
        raise KeyboardInterrupt

    made = Stage("made", whole, ("seed",), None, lambda paths: [paths.generated / "job.json"])
    run_stage(made, config)
    assert is_done(made, config)
    with pytest.raises(KeyboardInterrupt):
        run_stage(replace(made, run=stopped), config)
    # Every real stage replaces a local directory as a whole, so there the identity of one file is enough.
    assert is_done(made, config) == (written == 0 or place == "local")
